"""How a model is rounded: what a user chose.

Owns the choice of scheme and method for each weight; what comes of it weight by weight is rounder.py's, and what is made of a static
recipe static.py's.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

import onnx_ir as ir

from txopt.calibration import amax
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.formats import FORMATS, FP8, INT8, Format
from txopt.calibration.linears import Role, reads
from txopt.calibration.weights import LOOK_AT_DATA, Method
from txopt.runtime.errors import UsageError, explain

# Products of blocks this wide are equal to the bit for one row and for many; those of wider ones are not (docs/decisions.md 30).
SCHEMES = {
    "int8": BlockScheme(bits=8, block=64),
    "int4": BlockScheme(bits=4, block=32, symmetric=False),
}
METHODS = {"int8": Method.RTN, "int4": Method.DESCENT}
COLUMNS = BlockScheme(bits=8, block=None)  # the scheme of ROWS
# Zero points are refused there. Blocks of 64 are among the widths that NVIDIA documents (64, 128) and the narrower of them.
TENSORRT = {"int8": COLUMNS, "int4": BlockScheme(bits=4, block=64)}
# Of the bytes of the weights in float32: what is left of it, the most sensitive weights get, in 8 bits instead of 4.
SIZES = {("int4", Method.DESCENT): 0.17}
TARGETS = ("cpu", "tensorrt")


class Scheme(StrEnum):
    """What is known beforehand."""

    WEIGHTS = "weights"  # weights in blocks; activations as they are (tensorrt), or rounded as they come, by row and block (cpu)
    ROWS = "rows"  # weights in whole columns; activations are rounded as they come, row by row
    MIXED = "mixed"  # the encoder's linear layers by rows, of which it sees many at once, and the rest in blocks
    STATIC = "static"  # one scale for every activation too: pairs of QuantizeLinear and DequantizeLinear


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A scheme and a method for all weights.

    Attributes:
        target: whose products it is for: ONNX Runtime's ("cpu"), which round activations too, or TensorRT's, which do not.
        encoder: the scheme of the encoder's linear layers, where that is another.
        uneven: names of the weights that blocks cannot be cut from: they have whole columns of 8 bits.
        finer: names of the weights that lose too much by it: they get the next finer scheme.
        size: bytes of all weights, as a share of those in float32, up to which the most sensitive get it without being asked.
    """

    scheme: BlockScheme
    method: Method
    target: str = "cpu"
    encoder: BlockScheme | None = None
    uneven: frozenset[str] = frozenset()
    finer: frozenset[str] = frozenset()
    size: float | None = None

    @classmethod
    def of(
        cls, precision: str, target: str = "cpu", *, method: str | None = None, block: int | None = None
    ) -> "Recipe":
        """The recipe of "int8" or "int4", with what a user says otherwise.

        Raises:
            UsageError: there is no such precision, method or block.
        """
        if precision == FP8.name:
            raise UsageError("precision: fp8 is for --scheme static --target tensorrt; give both, or choose int8")
        if precision not in SCHEMES:
            known = ", ".join(dict.fromkeys((*SCHEMES, *FORMATS, "fp16", "bf16")))
            raise UsageError(f"precision: expected one of {known} to quantize, got {precision!r}")
        if method is not None and method not in tuple(Method):
            raise UsageError(f"method: expected one of {', '.join(Method)}, got {method!r}")
        schemes = TENSORRT if target == "tensorrt" else SCHEMES
        scheme = schemes[precision] if block is None else replace(schemes[precision], block=block)
        chosen = METHODS[precision] if method is None else Method(method)
        return cls(scheme=scheme, method=chosen, target=target, size=SIZES.get((precision, chosen)))

    def fitted(self, graphs: Iterable[ir.Graph]) -> "Recipe":
        """The same, with the ``uneven`` weights of ``graphs``: TensorRT has no block that is shorter than the others."""
        block = self.scheme.block
        if self.target == "cpu" or block is None:
            return self
        found = {read.name for graph in graphs for read in reads(graph) if read.size % block}
        return replace(self, uneven=frozenset(found))

    @classmethod
    def by_rows(cls, precision: str, *, mixed: bool, method: str | None = None, block: int | None = None) -> "Recipe":
        """The recipe of "int8" in whole columns, or in such for the encoder alone (``mixed``).

        Raises:
            UsageError: as ``of``, and for another precision, or blocks where there are none.
        """
        if precision != "int8" or (block is not None and not mixed):
            raise UsageError(
                f"scheme {Scheme.MIXED if mixed else Scheme.ROWS}: expected int8{'' if mixed else ' without blocks'}, got {precision}"
                + ("" if block is None else f" in blocks of {block}")
            )
        blocks = cls.of(precision, method=method, block=block)
        return replace(blocks, encoder=COLUMNS) if mixed else replace(blocks, scheme=COLUMNS)

    def scheme_of(self, name: str, *, graph: str, role: Role) -> BlockScheme | None:
        """The scheme of the weight ``name`` as ``graph`` reads it, in ``role``; None: it stays in float.

        Finer ones have blocks no longer than the others: activations are rounded by blocks, too, and should not lose by it.
        """
        if name in self.uneven:
            scheme = COLUMNS
        else:
            linear = graph == "encoder" and role is Role.LINEAR
            scheme = self.encoder if linear and self.encoder is not None else self.scheme
        if name not in self.finer:
            return scheme
        if self.target == "tensorrt":
            return COLUMNS if scheme.bits < COLUMNS.bits else None
        finer = SCHEMES["int8"]
        if scheme.bits == finer.bits and scheme.block is not None:
            return None
        return replace(finer, block=min(each for each in (finer.block, scheme.block, self.scheme.block) if each))

    @property
    def rounds_activations(self) -> bool:
        """Whether products round what they multiply weights with, too."""
        return self.target == "cpu"

    @property
    def looks_at_data(self) -> bool:
        """Whether codes depend on what calibration sees."""
        return self.method in LOOK_AT_DATA

    def with_finer(self, names: Collection[str]) -> "Recipe":
        """The same with the weights ``names`` among the finer ones."""
        return replace(self, finer=self.finer | frozenset(names))

    def form(self, name: str, *, graph: str, role: Role) -> str | None:
        """What the weight ``name`` is stored as, for people; None: float32."""
        scheme = self.scheme_of(name, graph=graph, role=role)
        if scheme is None or scheme.block is None:
            return None if scheme is None else f"{scheme.bits} bits, one scale for each output"
        return f"{scheme.bits} bits in blocks of {scheme.block}"


@dataclass(frozen=True, kw_only=True)
class StaticRecipe:
    """Products with static codes.

    Attributes:
        codes: of activations and weights.
        clipping: how ranges of activations are found.
        keep: names of weights whose products stay in float.
    """

    codes: Format = INT8
    clipping: amax.Method = field(default_factory=amax.MSE)
    keep: frozenset[str] = frozenset()

    looks_at_data: ClassVar[bool] = True

    @property
    def finer(self) -> frozenset[str]:
        """What ``keep`` is called for weights in blocks."""
        return self.keep

    def with_finer(self, names: Collection[str]) -> "StaticRecipe":
        """The same with the products of the weights ``names`` in float."""
        return replace(self, keep=self.keep | frozenset(names))

    def form(self, name: str, *, graph: str, role: Role) -> str | None:
        """What the weight ``name`` is stored as, for people; None: float32."""
        return None if name in self.keep else f"{self.codes.title}, one scale for each output"

    @classmethod
    def of(
        cls, precision: str, target: str = "cpu", *, method: str | None = None, block: int | None = None
    ) -> "StaticRecipe":
        """The recipe of "int8" or "fp8", with a way of clipping (``amax.METHODS``) that a user names.

        E4M3 has steps that shrink with the number, so that nothing is won by clipping: its ranges reach the largest that was seen.

        Raises:
            UsageError: there is no such method, or the scheme has no such choice.
        """
        problems = []
        if precision not in FORMATS:
            problems.append(f"precision: expected one of {', '.join(FORMATS)}, got {precision!r}")
        if target not in TARGETS:
            problems.append(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
        elif precision == FP8.name and target == "cpu":
            problems.append("precision: fp8 is for the tensorrt target, for no CPU multiplies in it, got target 'cpu'")
        if method is not None and method not in amax.METHODS:
            problems.append(f"method: expected one of {', '.join(amax.METHODS)}, got {method!r}")
        if block is not None:
            problems.append(f"block: expected none, for weights have a scale for each output, got {block}")
        if problems:
            raise UsageError(explain("the static scheme cannot be had like this:", problems))
        if method is None:
            method = amax.Absmax.name if precision == FP8.name else amax.MSE.name
        return cls(codes=FORMATS[precision], clipping=amax.METHODS[method]())


def recipe_of(
    scheme: str, precision: str, target: str = "cpu", *, method: str | None = None, block: int | None = None
) -> Recipe | StaticRecipe:
    """The recipe of a scheme.

    Raises:
        UsageError: there is no such scheme, or it has no such precision, target, method or block.
    """
    if scheme not in tuple(Scheme):
        raise UsageError(f"scheme: expected one of {', '.join(Scheme)}, got {scheme!r}")
    if scheme == Scheme.STATIC:
        return StaticRecipe.of(precision, target, method=method, block=block)
    if scheme == Scheme.WEIGHTS:
        if target not in TARGETS:
            raise UsageError(f"target: expected one of {', '.join(TARGETS)} for weights of integers, got {target!r}")
        return Recipe.of(precision, target, method=method, block=block)
    if target != "cpu":
        raise UsageError(
            f"target: expected cpu, which alone rounds activations row by row, got {target!r}; "
            "for tensorrt take the scheme weights or static"
        )
    return Recipe.by_rows(precision, mixed=scheme == Scheme.MIXED, method=method, block=block)
