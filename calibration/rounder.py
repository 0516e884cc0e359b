"""Blocks of all weights of an artifact's graphs, by a recipe; what was found for one recipe is not found again for the next.

Owns which second moments belong to which weight. How codes are found is weights.py's, where moments come from collect.py's.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.linears import Read, Role, reads
from txopt.calibration.moments import damped
from txopt.calibration.recipe import Recipe
from txopt.calibration.weights import LOOK_AT_DATA, Method, quantize

Moments = Mapping[str, Mapping[str, NDArray[Any]]]

# Of the mean second moment, added to each of a head's whose table an embedding reads too: there all numbers of a row count alike.
LOOKED_UP = 0.5


class Rounder:
    """The weights of one artifact, rounded.

    Args:
        moments: [K,K] of the inputs of products, by graph and input; empty where no method looks at data.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._found: dict[tuple[str, Method, BlockScheme], Blocks] = {}

    def blocks(self, models: Mapping[str, ir.Model], recipe: Recipe) -> dict[str, dict[str, Blocks]]:
        """Blocks of every weight of ``models`` that is rounded, by graph and name.

        Weights of equal numbers that are tables have the same codes in every graph, so that they are stored once: those for the
        inputs of the head, where there is one.
        """
        heads = self._heads(models)
        found: dict[str, dict[str, Blocks]] = {name: {} for name in models}
        for graph, model in models.items():
            for read in reads(model.graph):
                scheme = recipe.scheme_of(read.name, graph=graph, role=read.role)
                if scheme is not None and read.name not in found[graph]:
                    found[graph][read.name] = self._one(graph, read, recipe.method, scheme, heads)
        return found

    def _one(
        self, graph: str, read: Read, method: Method, scheme: BlockScheme, heads: Mapping[str, NDArray[Any]]
    ) -> Blocks:
        numbers = _numbers(read)
        if read.role is Role.LINEAR:
            key, matrix, moments = f"{graph}/{read.name}", numbers, self._seen(graph, read)
        else:
            key = _digest(numbers)
            matrix, moments = numbers.T, heads.get(key)
        if moments is None and method in LOOK_AT_DATA:
            method = Method.CLIP  # a table that is looked up in, and no head's
        if (key, method, scheme) not in self._found:
            self._found[key, method, scheme] = quantize(matrix, scheme, method, moments=moments, name=read.name)
        return self._found[key, method, scheme]

    def _heads(self, models: Mapping[str, ir.Model]) -> dict[str, NDArray[Any]]:
        """Second moments of the inputs of heads that are tied to a table, by the digest of its numbers."""
        found: dict[str, NDArray[Any]] = {}
        for graph, model in models.items():
            for read in reads(model.graph):
                seen = self._seen(graph, read) if read.role is Role.HEAD else None
                if seen is not None:
                    found.setdefault(_digest(_numbers(read)), damped(seen, LOOKED_UP))
        return found

    def _seen(self, graph: str, read: Read) -> NDArray[Any] | None:
        assert read.activations is not None, "products have them"
        return self._moments.get(graph, {}).get(str(read.activations.name))


def _numbers(read: Read) -> NDArray[Any]:
    assert read.weight.const_value is not None, "reads() gives no others"
    numbers: NDArray[Any] = read.weight.const_value.numpy()
    return numbers


def _digest(numbers: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()
