"""How the weights of a model are rounded: what a user chose, made into blocks weight by weight.

Owns the choice of scheme and method for each weight; how codes are found is weights.py's, where data come from collect.py's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.linears import Role, reads
from txopt.calibration.weights import Method, quantize
from txopt.runtime.errors import UsageError

# Products of blocks this wide are equal to the bit for one row and for many; those of wider ones are not (docs/quantization.md).
SCHEMES = {
    "int8": BlockScheme(bits=8, block=64),
    "int4": BlockScheme(bits=4, block=32, symmetric=False),
}
METHODS = {"int8": Method.RTN, "int4": Method.GPTQ}

Moments = Mapping[str, NDArray[Any]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A scheme and a method for all weights, and the weights, by name, that lose too much by it: they get the next finer one."""

    scheme: BlockScheme
    method: Method
    finer: frozenset[str] = frozenset()

    @classmethod
    def of(cls, precision: str, *, method: str | None = None, block: int | None = None) -> "Recipe":
        """The recipe of "int8" or "int4", with what a user says otherwise.

        Raises:
            UsageError: there is no such precision, method or block.
        """
        if precision not in SCHEMES:
            raise UsageError(f"precision: expected one of {', '.join(SCHEMES)} to quantize, got {precision!r}")
        if method is not None and method not in tuple(Method):
            raise UsageError(f"method: expected one of {', '.join(Method)}, got {method!r}")
        scheme = SCHEMES[precision] if block is None else replace(SCHEMES[precision], block=block)
        return cls(scheme=scheme, method=METHODS[precision] if method is None else Method(method))

    def scheme_of(self, name: str) -> BlockScheme | None:
        """The scheme of the weight ``name``; None: it stays in float."""
        if name not in self.finer:
            return self.scheme
        return SCHEMES["int8"] if self.scheme.bits < SCHEMES["int8"].bits else None

    @property
    def looks_at_data(self) -> bool:
        """Whether codes depend on what calibration sees."""
        return self.method in (Method.GPTQ, Method.CLIP)


def rounded(model: ir.Model, recipe: Recipe, moments: Moments) -> dict[str, Blocks]:
    """Blocks of every weight of ``model`` that is rounded, by name; ``moments`` [K,K] of products' inputs by the input's name.

    A table has the same codes in every graph that reads it, so that it is stored once: it is rounded without looking at data.
    """
    found: dict[str, Blocks] = {}
    for read in reads(model.graph):
        tensor, scheme = read.weight.const_value, recipe.scheme_of(read.name)
        if tensor is None or scheme is None or read.name in found:
            continue
        if read.role is Role.LINEAR and read.activations is not None:
            seen = moments.get(str(read.activations.name))
            found[read.name] = quantize(tensor.numpy(), scheme, recipe.method, moments=seen, name=read.name)
        else:
            found[read.name] = quantize(tensor.numpy().T, scheme, _BLIND[recipe.method], name=read.name)
    return found


_BLIND = {Method.RTN: Method.RTN, Method.HQQ: Method.HQQ, Method.CLIP: Method.CLIP, Method.GPTQ: Method.CLIP}
