"""What a module of one's own reads: its encoder's inputs, and which of them masks which of the memories that encode() returns.

Owns the attributes ``inputs`` and ``memory_masks`` of docs/custom-models.md, inputs to try a module with, and whether what encode()
returns is what they promise. It does not know what a decoder does with memories.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from txopt.exporter.custom import as_memories, described
from txopt.exporter.source import Input, Memory
from txopt.runtime.errors import SourceError
from txopt.runtime.graphs import SOURCE_AXES
from txopt.runtime.options import UNSUPPORTED, GenerationOptions

Masks = tuple[str | None, ...]

IDS, MASK = "input_ids", "attention_mask"
_KEYS = {"axes", "vocabulary", "max_length"}
_TAKEN = {"decoder_input_ids", *UNSUPPORTED, *(field.name for field in fields(GenerationOptions))}


def is_whole(value: Any, least: int) -> bool:
    """Whether ``value`` is an int of at least ``least``; bool is an int to Python, and not here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def problems(module: Any) -> list[str]:
    """What is wrong with ``inputs`` and ``memory_masks`` of ``module``; both may be absent."""
    declared, masks = getattr(module, "inputs", None), _masks(module)
    found = []
    if not isinstance(masks, (list, tuple)) or not masks or not all(m is None or isinstance(m, str) for m in masks):
        return [f"memory_masks: expected for each memory the name of the input that masks it, or None, got {masks!r}"]
    if declared is None:
        names = {IDS, MASK}
    elif not isinstance(declared, Mapping) or not declared:
        return [f"inputs: expected a mapping of encode()'s arguments, got {declared!r}"]
    else:
        names = set(declared)
        found += [problem for name, said in declared.items() for problem in _of_input(name, said, name in masks)]
        found += _of_order(module, list(declared))
    return found + [
        f"memory_masks names {m!r}: expected one of {', '.join(map(str, sorted(names)))}"
        for m in masks
        if m is not None and m not in names
    ]


def read(module: Any, vocabulary: int, limit: int | None) -> tuple[tuple[Input, ...], Masks]:
    """The inputs of ``module``, in the order of encode(), and the mask of each memory; it has no ``problems``.

    Args:
        module: whose attributes these are.
        vocabulary: ids are below it where the module declares no inputs.
        limit: how long ids may be that do not say it themselves.
    """
    masks: Masks = tuple(_masks(module))
    declared = getattr(module, "inputs", None)
    if declared is None:
        declared = {IDS: {"axes": ("B", "T"), "vocabulary": vocabulary}, MASK: {"axes": ("B", "T")}}
    return tuple(_input(name, said, name in masks or name == MASK, limit) for name, said in declared.items()), masks


def examples(
    inputs: Sequence[Input],
    lengths: Mapping[str, int],
    *,
    rows: int = 1,
    ids: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Inputs to try a module with, ``lengths`` by letter: ids as told (the last there is where they are fewer), masks of ones."""
    made = {}
    for item in inputs:
        shape = [rows, *(axis if isinstance(axis, int) else lengths[axis] for axis in item.axes[1:])]
        if item.dtype != "int64":
            made[item.name] = torch.zeros(shape, dtype=dtype)
        else:
            made[item.name] = torch.full(shape, 1 if item.vocabulary is None else min(ids, item.vocabulary - 1))
    return made


def example_lengths(inputs: Sequence[Input], first: int) -> dict[str, int]:
    """A length for every letter: ``first``, and each one more than the one before, as far as the inputs may be long."""
    limits = {
        letter: [item.limit for item in inputs if letter in item.axes and item.limit is not None]
        for letter in SOURCE_AXES
    }
    return {letter: min([first + index, *limits[letter]]) for index, letter in enumerate(SOURCE_AXES)}


def memories_of(inputs: Sequence[Input], masks: Masks) -> tuple[Memory, ...]:
    """What the decoder reads, by the inputs that mask it."""
    axes = {item.name: item.axes[1] for item in inputs if len(item.axes) > 1}
    return tuple(Memory(axis=None if mask is None else axes[mask], mask=mask) for mask in masks)


def check_memories(found: Any, masks: Masks, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What encode() returned for ``given``, as a list.

    Raises:
        SourceError: another number of memories than masks, no tensors [B,T,M], or one not as long as its mask.
    """
    memories, rows = as_memories(found), len(next(iter(given.values())))
    if len(memories) != len(masks):
        raise SourceError(
            f"encode() returns {_several(len(memories))}, and memory_masks is {masks!r}: expected the name of one mask for each, "
            "None where it is never padded (see docs/custom-models.md)"
        )
    for index, (memory, mask) in enumerate(zip(memories, masks, strict=True)):
        name = "encode()" if len(memories) == 1 else f"encode(), memory {index},"
        length = None if mask is None else given[mask].shape[1]
        fits = isinstance(memory, Tensor) and memory.dim() == 3 and memory.shape[0] == rows
        if not fits or length not in (None, memory.shape[1]):
            raise SourceError(
                f"{name} must return a tensor [{rows},{'T' if length is None else length},M]"
                f"{'' if length is None else f', as long as {mask}'}, {described(memory)}"
            )
    return memories


def _several(count: int) -> str:
    return "one memory" if count == 1 else f"a tuple of {count} memories"


def _masks(module: Any) -> Any:
    return getattr(module, "memory_masks", (MASK,))


def _of_input(name: Any, said: Any, masks: bool) -> Iterator[str]:
    where = f"inputs[{name!r}]"
    if not isinstance(said, Mapping) or "axes" not in said or set(said) - _KEYS:
        yield f"{where}: expected a mapping with axes, and perhaps vocabulary and max_length, got {said!r}"
        return
    axes = said["axes"]
    known = isinstance(axes, (list, tuple)) and all(axis in SOURCE_AXES or is_whole(axis, 1) for axis in axes[1:])
    if not known or len(axes) < 2 or axes[0] != "B" or (masks and len(axes) != 2):
        shape = '("B", length)' if masks else '("B", length, ...)'
        yield f"{where}['axes']: expected {shape}, lengths being numbers or letters of {' '.join(SOURCE_AXES)}, got {axes!r}"
    for key, least in (("vocabulary", 1), ("max_length", 2)):
        if (value := said.get(key)) is not None and not is_whole(value, least):
            yield f"{where}[{key!r}]: expected a whole number of at least {least}, or no such key, got {value!r}"
    if masks and said.get("vocabulary") is not None:
        yield f"{where}: is named in memory_masks, and a mask has no vocabulary; got {said['vocabulary']!r}"
    if name in _TAKEN:
        yield f"{where}: generate() takes an option of this name; call encode()'s argument otherwise"


def _of_order(module: Any, names: list[Any]) -> Iterator[str]:
    """generate() takes inputs by name, encode() by position: both must mean the same."""
    encode = getattr(module, "encode", None)
    if not callable(encode):
        return
    parameters = inspect.signature(encode).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return
    if (taken := [each.name for each in parameters]) != names:
        yield f"inputs: expected encode()'s arguments in its order, {', '.join(taken)}, got {', '.join(map(str, names))}"


def _input(name: str, said: Mapping[str, Any], masks: bool, limit: int | None) -> Input:
    axes, vocabulary = tuple(said["axes"]), said.get("vocabulary")
    dtype = "int64" if masks or vocabulary is not None else "float32"
    own = said.get("max_length", limit if vocabulary is not None else None)
    return Input(
        name=name,
        dtype=dtype,
        axes=axes,
        vocabulary=vocabulary,
        limit=None if masks or isinstance(axes[1], int) else own,
    )
