"""The encoder's inputs: what a caller gave, checked against what the manifest says of the graph, before the engine sees it.

Owns names, dtypes, shapes, and the ids and lengths that the model knows. It knows neither the engine nor what ids mean.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from txopt.runtime.arrays import Array, as_array
from txopt.runtime.errors import InputError, explain
from txopt.runtime.graphs import FLOATS, GLOBAL_MASK, Axes, GraphSpec, TensorSpec

_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
_LARGEST = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": (2 - 2**-7) * 2.0**127,
}


@dataclass(frozen=True)
class Bound:
    """What the model's tables hold: ids are below ``vocabulary``, and an input has at most ``positions`` columns, padding included.

    None: no bound, or the manifest does not say.
    """

    vocabulary: int | None = None
    positions: int | None = None


def bounds_of(frontend: Mapping[str, Any]) -> dict[str, Bound]:
    """By input, what the manifest's "frontend" says of its model's tables."""
    own = Bound(frontend.get("source_vocabulary"), frontend.get("source_positions"))
    return {"input_ids": own, **{name: Bound(**bound) for name, bound in frontend.get("bounds", {}).items()}}


def check_inputs(
    spec: GraphSpec,
    inputs: Mapping[str, Any],
    *,
    masks: Collection[str] = ("attention_mask",),
    bounds: Mapping[str, Bound] | None = None,
    samples: tuple[int | None, int | None] = (None, None),
) -> dict[str, Array]:
    """The graph's feeds, in its dtypes, bfloat16 as its bits; every problem with ``inputs`` in one InputError.

    Args:
        spec: the encoder's; what varies in its inputs' axes agrees within a call.
        inputs: arrays, or what becomes one, by name; a missing global_attention_mask means no token of global attention.
        masks: the inputs that may be missing, which means no padding.
        bounds: by input.
        samples: the fewest samples that each row of input_values may have, and the most columns of it; None: no bound.
    """
    known = {item.name: item for item in spec.inputs}
    fills = {**dict.fromkeys(masks, 1), GLOBAL_MASK: 0}
    problems = [f"{name}: unknown; expected {', '.join(known)}" for name in inputs if name not in known]
    given: dict[str, Array] = {}
    for name in known:
        if (value := inputs.get(name)) is not None:
            try:
                given[name] = np.ascontiguousarray(as_array(name, value))
            except InputError as err:
                problems.append(str(err))
        elif name not in fills:
            problems.append(f"{name}: missing; expected {known[name].dtype} {axes_of(known[name].axes)}")
    sizes: dict[str, int] = {}
    for name, found in given.items():
        misfits = _misfits(known[name], found, sizes)
        if bounds and name in bounds and not misfits:
            misfits = _beyond(name, found, bounds[name])
        problems += misfits
    for name in [name for name in known if name in fills and inputs.get(name) is None]:
        shape = [axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in known[name].axes]
        if all(shape):
            given[name] = np.full(shape, fills[name], np.int64)
        elif not any(set(known[name].axes[1:]) & set(known[other].axes) for other in known.keys() & inputs.keys()):
            problems.append(f"{name}: missing; expected {known[name].dtype} {axes_of(known[name].axes)}")
    if not problems and "input_values" in given:
        problems = _unheard(given["input_values"], given.get("attention_mask"), *samples)
    if problems:
        raise InputError(explain("the inputs do not fit the model:", problems))
    return {name: _as_fed(known[name], value) for name, value in given.items()}


def axes_of(axes: Axes) -> str:
    return "[" + ",".join(map(str, axes)) + "]"


def _misfits(item: TensorSpec, value: Array, sizes: dict[str, int]) -> list[str]:
    found = f"{item.name}: expected {item.dtype} {axes_of(item.axes)}, got {value.dtype} {list(value.shape)}"
    integral, floating = item.dtype.startswith("int"), item.dtype in FLOATS
    if integral and value.size and value.dtype.kind in "iu" and value.min() < 0:
        return [f"{item.name}: expected ids and masks of at least 0, got {value.min()}"]
    kinds = "f" if floating else "iub" if integral else "b"
    if value.dtype.kind not in kinds or value.ndim != len(item.axes) or 0 in value.shape:
        return [found]
    for axis, size in zip(item.axes, value.shape, strict=True):
        expected = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
        if size != expected:
            return [found if isinstance(axis, int) else f"{found} ({axis} is {expected} in the inputs before it)"]
    if floating and not (extreme := np.abs(value).max()) <= _LARGEST[item.dtype]:
        return [
            f"{item.name}: expected finite numbers that {item.dtype} holds, got {extreme}; look where they come from"
        ]
    return []


def _beyond(name: str, value: Array, bound: Bound) -> list[str]:
    """Where sources [B,T] or [B,T,...] leave the tables of words and positions, which the engine would read beyond their ends."""
    problems = []
    if bound.vocabulary is not None and (largest := int(value.max())) >= bound.vocabulary:
        problems.append(
            f"{name}: expected ids of this model's source vocabulary, 0 to {bound.vocabulary - 1}, got {largest}"
        )
    if bound.positions is not None and (width := value.shape[1]) > bound.positions:
        problems.append(
            f"{name}: expected sources of at most {bound.positions} tokens, padding included: the model knows as many "
            f"positions; got {width}; shorten them"
        )
    return problems


def _unheard(sound: Array, mask: Array | None, least: int | None, most: int | None) -> list[str]:
    """Where sounds [B,N] are too short to make a frame, or longer than the model has positions for."""
    problems = []
    shortest = sound.shape[1] if mask is None else int((mask != 0).sum(1).min())
    if least is not None and shortest < least:
        problems.append(f"input_values: expected sounds of at least {least} samples, got {shortest}; make it longer")
    if most is not None and sound.shape[1] > most:
        problems.append(
            f"input_values: expected sounds of at most {most} samples, padding included, got {sound.shape[1]}; cut it up"
        )
    return problems


def _as_fed(item: TensorSpec, value: Array) -> Array:
    """In the dtype of the input; numpy has no bfloat16, so its bits, of the nearest number, a tie to the even one."""
    if item.dtype != "bfloat16":
        return value.astype(_DTYPES[item.dtype], copy=False)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
