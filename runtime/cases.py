"""Reference cases: what PyTorch said, kept small enough to travel with an artifact.

Owns which positions and vocabulary columns of a tensor are kept, and the file (safetensors, never a pickle). Recording is the
exporter's work (reference.py), comparing is parity.py's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import ArtifactError, SourceError

FILE = "parity.safetensors"
COLUMNS = 256  # vocabulary columns kept of each step's logits, beside their log-sum-exp, which sees all of them
POSITIONS = 8  # source positions kept of encoder states
INPUT_STEP = 1 / 16  # float inputs are multiples of this, so that they travel as int8,
INPUT_HOLD = 4  # and keep their value for so many places of the last axis

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question and PyTorch's answers.

    Args:
        name: what is special about it.
        inputs: encoder inputs by name; a decoder alone has "input_ids" and "attention_mask" of its prompt here.
        tokens: int64 [B,L] fed by teacher forcing, empty for encoder-only models.
        schedule: query tokens of each call; they sum to L.
        expected: float32 answers by tensor name, sampled as ``sample`` says.
        generated: int64 ids by search ("greedy", "beam"), with the prompt.
        options: generate() options by search.
        margins: float32 [B,G], how far the best logit is ahead at every greedy step.
        scores: float32 [B], the beam's scores.
    """

    name: str
    inputs: dict[str, Array]
    tokens: Array
    schedule: tuple[int, ...] = ()
    expected: dict[str, Array] = field(default_factory=dict)
    generated: dict[str, Array] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    margins: Array | None = None
    scores: Array | None = None


def sample(name: str, value: Array, lengths: Sequence[int]) -> Array:
    """The part of a tensor that is kept, float32.

    Source-long tensors (memories, cross K/V) keep POSITIONS places of each row's unpadded part, whose ``lengths`` are those of the
    source that they are about; self K/V [B,H,L,D] the first and the last place, logits [B,L,V] the places of ``columns``; everything
    else is kept whole.
    """
    if name.partition(".")[0] == "memory":
        kept = np.stack([row[places(length)] for row, length in zip(value, lengths, strict=True)])
    elif name.startswith("cross_"):
        kept = np.stack([row[:, places(length, 2)] for row, length in zip(value, lengths, strict=True)])
    elif name.startswith("self_"):
        kept = value[:, :, [0, -1]]
    elif name == "logits" and value.ndim == 3 and value.shape[2] > COLUMNS:
        kept = value[..., places(value.shape[2], COLUMNS)]
    else:
        kept = value
    return np.ascontiguousarray(kept, np.float32)


def source_axis(name: str) -> int:
    """Which axis of a source-long tensor is the source's: memory [B,T,M], logits of tokens [B,T,labels], cross K/V [B,H,T,D]."""
    return 2 if name.startswith("cross_") else 1


def places(length: int, count: int = POSITIONS) -> NDArray[np.int64]:
    """``count`` places from the first to the last of ``length``; repeated where there are fewer."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)


Axis = str | int


class Lengths:
    """How long the sources of a case's rows are, by axis (docs/format.md, "The alphabet of axes").

    Args:
        inputs: the case's.
        masks: those of its inputs that are masks, right-padded, and the axis that each is about.
    """

    def __init__(self, inputs: Mapping[str, Array], masks: Mapping[str, Axis]) -> None:
        self._batch = len(next(iter(inputs.values())))
        self._counts: dict[Axis, list[list[int]]] = {}
        for name, axis in masks.items():
            self._counts.setdefault(axis, []).append([int(count) for count in inputs[name].sum(1)])

    def seen(self, axis: Axis, size: int) -> list[int]:
        """[B], how many places along ``axis`` every mask of that axis lets through; ``size`` where there is none."""
        return [min(row) for row in self._rows(axis, size)]

    def given(self, axis: Axis, size: int) -> list[int]:
        """[B], how many places along ``axis`` some mask lets through: the rest is padding; ``size`` where there is none."""
        return [max(row) for row in self._rows(axis, size)]

    def _rows(self, axis: Axis, size: int) -> list[tuple[int, ...]]:
        return list(zip(*self._counts.get(axis, [[size] * self._batch]), strict=True))


def log_sum_exp(logits: Array) -> NDArray[np.float32]:
    """float32 [B,L] of logits [B,L,V], in float64 on the way."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(wide - top).sum(-1)) + top[..., 0], np.float32)


def draw_floats(shape: Sequence[int], generator: np.random.Generator) -> NDArray[np.float32]:
    """Float inputs float32 of ``shape`` that survive being packed; the last size is a multiple of INPUT_HOLD.

    Errors:
        SourceError: it is not.
    """
    *outer, width = shape
    if width % INPUT_HOLD:
        raise SourceError(f"float inputs must be a multiple of {INPUT_HOLD} wide, this model takes {width}")
    held = generator.integers(-24, 25, (*outer, width // INPUT_HOLD)).astype(np.int8)
    return _unpacked(held)


def save(cases: Sequence[Case], directory: Path) -> None:
    """Writes ``parity.safetensors``; the same cases give the same bytes."""
    from safetensors.numpy import save_file

    tensors: dict[str, Array] = {}
    index = []
    for case in cases:
        for group, values in (("inputs", case.inputs), ("expected", case.expected), ("generated", case.generated)):
            tensors |= {f"{case.name}/{group}/{key}": _packed(key, group, value) for key, value in values.items()}
        tensors[f"{case.name}/tokens"] = case.tokens
        extra = {"margins": case.margins, "scores": case.scores}
        tensors |= {f"{case.name}/{key}": value for key, value in extra.items() if value is not None}
        index.append({"name": case.name, "schedule": case.schedule, "options": case.options})
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, directory / FILE, metadata={"cases": json.dumps(index, sort_keys=True)})


def load(directory: Path) -> list[Case]:
    """Reads what ``save`` wrote.

    Errors:
        ArtifactError: the file is not a safetensors file with cases.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / FILE, framework="np") as file:
            index = json.loads((file.metadata() or {})["cases"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        return [_case(entry, tensors) for entry in index]
    except (SafetensorError, OSError, ValueError) as err:
        raise ArtifactError(f"{directory / FILE} holds no reference cases: {err}") from err
    except (KeyError, TypeError) as err:
        raise ArtifactError(
            f"{directory / FILE} holds no whole reference cases: {err} is missing; export again"
        ) from err


def _case(entry: Mapping[str, Any], tensors: Mapping[str, Array]) -> Case:
    name = entry["name"]

    def group(kind: str) -> dict[str, Array]:
        prefix = f"{name}/{kind}/"
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Case(
        name=name,
        inputs={key: _unpacked(value) for key, value in group("inputs").items()},
        tokens=tensors[f"{name}/tokens"],
        schedule=tuple(entry["schedule"]),
        expected=group("expected"),
        generated=group("generated"),
        options=entry["options"],
        margins=tensors.get(f"{name}/margins"),
        scores=tensors.get(f"{name}/scores"),
    )


def _packed(name: str, group: str, value: Array) -> Array:
    if group != "inputs" or value.dtype.kind != "f":
        return value
    return np.round(value[..., ::INPUT_HOLD] / INPUT_STEP).astype(np.int8)


def _unpacked(value: Array) -> Array:
    if value.dtype != np.int8:
        return value
    return np.repeat(value.astype(np.float32) * np.float32(INPUT_STEP), INPUT_HOLD, axis=-1)
