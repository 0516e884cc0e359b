"""The encoder's inputs: what a caller gave, checked against what the manifest says of the graph, before the engine sees it.

Owns names, dtypes, shapes, and the ids and lengths that the model knows. It knows neither the engine nor what ids mean.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from txopt.runtime.arrays import Array, as_array
from txopt.runtime.errors import InputError, explain
from txopt.runtime.graphs import GLOBAL_MASK, GraphSpec, TensorSpec

_MASKED = {"input_ids", "input_values"}  # what an attention_mask may be left out for: nothing is padded then


def check_inputs(
    spec: GraphSpec,
    inputs: Mapping[str, Any],
    *,
    vocabulary: int | None = None,
    positions: int | None = None,
    samples: tuple[int | None, int | None] = (None, None),
) -> dict[str, Array]:
    """The graph's feeds, in its dtypes; every problem with ``inputs`` in one InputError.

    Args:
        spec: the encoder's; what varies in its inputs' axes agrees within a call.
        inputs: arrays, or what becomes one, by name; a missing attention_mask means no padding, a missing
            global_attention_mask no token of global attention.
        vocabulary: input_ids are below it; None: the manifest does not say.
        positions: the most columns that input_ids may have, padding included; None: no bound, or the manifest is silent.
        samples: the fewest samples that each row of input_values may have, and the most columns of it; None: as above.
    """
    known = {item.name: item for item in spec.inputs}
    problems = [f"{name}: unknown; expected {', '.join(known)}" for name in inputs if name not in known]
    given: dict[str, Array] = {}
    for name in known:
        if (value := inputs.get(name)) is not None:
            try:
                given[name] = np.ascontiguousarray(as_array(name, value))
            except InputError as err:
                problems.append(str(err))
        elif name == "attention_mask" and (masked := _MASKED & given.keys()):
            given[name] = np.ones(given[masked.pop()].shape, np.int64)
        elif name == GLOBAL_MASK and "input_ids" in given:
            given[name] = np.zeros(given["input_ids"].shape, np.int64)
        elif name not in ("attention_mask", GLOBAL_MASK) or all(
            inputs.get(each) is None for each in _MASKED
        ):  # else these are the problem
            problems.append(f"{name}: missing; expected {known[name].dtype} {axes_of(known[name])}")
    sizes: dict[str, int] = {}
    for name, found in given.items():
        misfits = _misfits(known[name], found, sizes)
        if name == "input_ids" and not misfits:
            misfits = _beyond(found, vocabulary, positions)
        problems += misfits
    if not problems and "input_values" in given:
        problems = _unheard(given["input_values"], given.get("attention_mask"), *samples)
    if problems:
        raise InputError(explain("the inputs do not fit the model:", problems))
    return {name: value.astype(_dtype(known[name]), copy=False) for name, value in given.items()}


def axes_of(item: TensorSpec) -> str:
    return "[" + ",".join(map(str, item.axes)) + "]"


def _misfits(item: TensorSpec, value: Array, sizes: dict[str, int]) -> list[str]:
    found = f"{item.name}: expected {item.dtype} {axes_of(item)}, got {value.dtype} {list(value.shape)}"
    integral = item.dtype.startswith("int")
    if integral and value.size and value.dtype.kind in "iu" and value.min() < 0:
        return [f"{item.name}: expected ids and masks of at least 0, got {value.min()}"]
    if value.dtype.kind not in ("iub" if integral else "f") or value.ndim != len(item.axes) or 0 in value.shape:
        return [found]
    for axis, size in zip(item.axes, value.shape, strict=True):
        expected = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
        if size != expected:
            return [found if isinstance(axis, int) else f"{found} ({axis} is {expected} in the inputs before it)"]
    if not integral and not (extreme := np.abs(value).max()) <= np.finfo(_dtype(item)).max:
        return [
            f"{item.name}: expected finite numbers that {item.dtype} holds, got {extreme}; look where they come from"
        ]
    return []


def _beyond(ids: Array, vocabulary: int | None, positions: int | None) -> list[str]:
    """Where sources [B,T] leave the tables of words and positions, which the engine would read beyond their ends."""
    problems = []
    if vocabulary is not None and (largest := int(ids.max())) >= vocabulary:
        problems.append(
            f"input_ids: expected ids of this model's source vocabulary, 0 to {vocabulary - 1}, got {largest}"
        )
    if positions is not None and (width := ids.shape[-1]) > positions:
        problems.append(
            f"input_ids: expected sources of at most {positions} tokens, padding included: the model knows as many "
            f"positions; got {width}; shorten them"
        )
    return problems


def _unheard(sound: Array, mask: Array | None, least: int | None, most: int | None) -> list[str]:
    """Where sounds [B,N] are too short to make a frame, or longer than the model has positions for."""
    problems = []
    shortest = sound.shape[1] if mask is None else int(mask.sum(1).min())
    if least is not None and shortest < least:
        problems.append(f"input_values: expected sounds of at least {least} samples, got {shortest}; make it longer")
    if most is not None and sound.shape[1] > most:
        problems.append(
            f"input_values: expected sounds of at most {most} samples, padding included, got {sound.shape[1]}; cut it up"
        )
    return problems


def _dtype(item: TensorSpec) -> type[Any]:
    return {"int64": np.int64, "float32": np.float32, "float16": np.float16}[item.dtype]
