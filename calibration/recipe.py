"""How a model is rounded: what a user chose.

Owns the choice of scheme and method for each weight; what comes of it weight by weight is rounder.py's, and what is made of a static
recipe static.py's.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

from txopt.calibration import amax
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.static import Sums
from txopt.calibration.weights import LOOK_AT_DATA, Method
from txopt.runtime.errors import UsageError, explain

# Products of blocks this wide are equal to the bit for one row and for many; those of wider ones are not (docs/quantization.md).
SCHEMES = {
    "int8": BlockScheme(bits=8, block=64),
    "int4": BlockScheme(bits=4, block=32, symmetric=False),
}
METHODS = {"int8": Method.RTN, "int4": Method.DESCENT}
# Of the bytes of the weights in float32: what is left of it, the most sensitive weights get, in 8 bits instead of 4.
SIZES = {("int4", Method.DESCENT): 0.17}


class Scheme(StrEnum):
    """What is known beforehand."""

    WEIGHTS = "weights"  # weights in blocks; activations are rounded as they come, row by row and block by block
    STATIC = "static"  # one scale for every activation too: pairs of QuantizeLinear and DequantizeLinear


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A scheme and a method for all weights.

    Attributes:
        finer: names of the weights that lose too much by it: they get the next finer scheme.
        size: bytes of all weights, as a share of those in float32, up to which the most sensitive get it without being asked.
    """

    scheme: BlockScheme
    method: Method
    finer: frozenset[str] = frozenset()
    size: float | None = None

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
        chosen = METHODS[precision] if method is None else Method(method)
        return cls(scheme=scheme, method=chosen, size=SIZES.get((precision, chosen)))

    def scheme_of(self, name: str) -> BlockScheme | None:
        """The scheme of the weight ``name``; None: it stays in float."""
        if name not in self.finer:
            return self.scheme
        return SCHEMES["int8"] if self.scheme.bits < SCHEMES["int8"].bits else None

    @property
    def looks_at_data(self) -> bool:
        """Whether codes depend on what calibration sees."""
        return self.method in LOOK_AT_DATA


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
