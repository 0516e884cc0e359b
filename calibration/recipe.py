"""How a model is rounded: what a user chose, and for weights in blocks, what comes of it weight by weight.

Owns the choice of scheme and method for each weight; how codes are found is weights.py's, where data come from collect.py's. What is
made of a static recipe is static.py's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration import amax
from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.linears import Role, reads
from txopt.calibration.static import Sums
from txopt.calibration.weights import Method, quantize
from txopt.runtime.errors import UsageError, explain

# Products of blocks this wide are equal to the bit for one row and for many; those of wider ones are not (docs/quantization.md).
SCHEMES = {
    "int8": BlockScheme(bits=8, block=64),
    "int4": BlockScheme(bits=4, block=32, symmetric=False),
}
METHODS = {"int8": Method.RTN, "int4": Method.GPTQ}

Moments = Mapping[str, NDArray[Any]]
Known = dict[tuple[str, BlockScheme], Blocks]  # by the weight's name and its scheme
Progress = Callable[[int, int], None]


class Scheme(StrEnum):
    """What is known beforehand."""

    WEIGHTS = "weights"  # weights in blocks; activations are rounded as they come, row by row and block by block
    STATIC = "static"  # one scale for every activation too: pairs of QuantizeLinear and DequantizeLinear


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

    def with_finer(self, names: Collection[str]) -> "Recipe":
        """The same with the weights ``names`` among the finer ones."""
        return replace(self, finer=self.finer | frozenset(names))

    def form(self, name: str) -> str | None:
        """What the weight ``name`` is stored as, for people; None: float32."""
        scheme = self.scheme_of(name)
        return None if scheme is None else f"{scheme.bits} bits in blocks of {scheme.block}"


@dataclass(frozen=True, kw_only=True)
class StaticRecipe:
    """Static int8.

    Attributes:
        clipping: how ranges of activations are found.
        sums: see static.Sums.
        keep: names of weights whose products stay in float.
    """

    clipping: amax.Method = field(default_factory=amax.MSE)
    sums: Sums = Sums.FLOAT
    keep: frozenset[str] = frozenset()

    looks_at_data: ClassVar[bool] = True

    @property
    def finer(self) -> frozenset[str]:
        """What ``keep`` is called for weights in blocks."""
        return self.keep

    def with_finer(self, names: Collection[str]) -> "StaticRecipe":
        """The same with the products of the weights ``names`` in float."""
        return replace(self, keep=self.keep | frozenset(names))

    def form(self, name: str) -> str | None:
        """What the weight ``name`` is stored as, for people; None: float32."""
        return None if name in self.keep else "int8, one scale for each output"

    @classmethod
    def of(cls, precision: str, *, method: str | None = None, block: int | None = None) -> "StaticRecipe":
        """The recipe of "int8", with a way of clipping (``amax.METHODS``) that a user names.

        Raises:
            UsageError: there is no such method, or static int8 has no such choice.
        """
        problems = []
        if precision != "int8":
            problems.append(
                f"precision: expected int8, the one of which engines have static products, got {precision!r}"
            )
        if method is not None and method not in amax.METHODS:
            problems.append(f"method: expected one of {', '.join(amax.METHODS)}, got {method!r}")
        if block is not None:
            problems.append(f"block: expected none, for weights have a scale for each output, got {block}")
        if problems:
            raise UsageError(explain("the static scheme cannot be had like this:", problems))
        return cls() if method is None else cls(clipping=amax.METHODS[method]())


def recipe_of(
    scheme: str, precision: str, *, method: str | None = None, block: int | None = None
) -> Recipe | StaticRecipe:
    """The recipe of a scheme.

    Raises:
        UsageError: there is no such scheme, or it has no such precision, method or block.
    """
    if scheme not in tuple(Scheme):
        raise UsageError(f"scheme: expected one of {', '.join(Scheme)}, got {scheme!r}")
    kind = StaticRecipe if scheme == Scheme.STATIC else Recipe
    return kind.of(precision, method=method, block=block)


def rounded(model: ir.Model, recipe: Recipe, moments: Moments, known: Known | None = None) -> dict[str, Blocks]:
    """Blocks of every weight of ``model`` that is rounded, by name; ``moments`` [K,K] of products' inputs by the input's name.

    A table has the same codes in every graph that reads it, so that it is stored once: it is rounded without looking at data.
    What an attempt before found is taken from ``known``, and what is found is added there.
    """
    found: dict[str, Blocks] = {}
    known = {} if known is None else known
    for read in reads(model.graph):
        tensor, scheme = read.weight.const_value, recipe.scheme_of(read.name)
        if tensor is None or scheme is None or read.name in found:
            continue
        if (read.name, scheme) in known:
            found[read.name] = known[read.name, scheme]
            continue
        if read.role is Role.LINEAR and read.activations is not None:
            seen = moments.get(str(read.activations.name))
            found[read.name] = quantize(tensor.numpy(), scheme, recipe.method, moments=seen, name=read.name)
        else:
            found[read.name] = quantize(tensor.numpy().T, scheme, _BLIND[recipe.method], name=read.name)
        known[read.name, scheme] = found[read.name]
    return found


_BLIND = {Method.RTN: Method.RTN, Method.HQQ: Method.HQQ, Method.CLIP: Method.CLIP, Method.GPTQ: Method.CLIP}
