"""How long the inputs of engines may be: ranges by letter, from what a user says and a manifest knows, and the profiles of each plan.

A plan is tuned for its profiles, so a decoder has several: decode steps of one token, and the prefill of a prompt. Knows no library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Self

from txopt.runtime.engines import Lengths, Profile
from txopt.runtime.errors import UsageError, explain
from txopt.runtime.graphs import SOURCE_AXES, GraphSpec
from txopt.runtime.manifest import Manifest

BATCH, BEAMS, SOURCE, PROMPT, CACHE = 8, 4, 512, 64, 512
USUAL_SOURCE = 64  # tokens of a text, what profiles are tuned for where sources vary
SECONDS = 30  # of sound, where a manifest sets no bound; at 16 kHz
_RATE = 16000
MOST = 1 << 20
_OPTIONS = {"cache": "--cache-length"}  # of ``txopt engine``; the others are named alike
# New tokens of a row in a step. Where they can only be one, TensorRT-RTX 1.7 finds no kernel for Attention in half precision with
# heads of 64; where they may be two it does, and is tuned for one all the same.
STEP: Lengths = (1, 1, 2)
_LEAST = {"cache": STEP[-1]}
_WHY = {"prompt": "the cache's length (--cache-length)"}
# What sizes are about: the letters, and what has them, which not every graph does.
_LETTERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "batch": (("B", "R"), "sources"),
    "beams": (("R",), "rows of beams"),
    "source": (SOURCE_AXES, "sources whose length varies"),
    "prompt": (("Q",), "prompts"),
    "cache": (("S",), "cache"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The most that engines take.

    Attributes:
        batch: sources. beams: rows of a source.
        source: tokens or frames of a source. prompt: tokens of a prompt in one call.
        cache: places in the self-attention buffers, which is also the most tokens that are generated, with the prompt.
    """

    batch: int
    beams: int
    source: int
    prompt: int
    cache: int

    @classmethod
    def of(cls, manifest: Manifest, **asked: int | None) -> Self:
        """``asked``, and what suits the model where nothing was asked (None).

        Raises:
            UsageError: a size is no count, more than the model has places for, or of what no graph has.
        """
        most_source, most_cache = _most_source(manifest), None if manifest.cache is None else manifest.cache.max_length
        cache = asked.get("cache") or min(most_cache or CACHE, CACHE)
        usual = {
            "batch": BATCH,
            "beams": max(BEAMS, _count(manifest.generation.get("num_beams"))),
            "source": most_source or _count(manifest.frontend.get("max_source_length")) or SOURCE,
            "prompt": min(PROMPT, cache),
            "cache": cache,
        }
        sizes = {name: asked.get(name) if asked.get(name) is not None else size for name, size in usual.items()}
        bounds = {"source": most_source, "cache": most_cache, "prompt": sizes["cache"]}
        lacking = {name: said for name, said in _lacking(manifest).items() if asked.get(name) is not None}
        problems = [
            f"{_OPTIONS.get(name, f'--max-{name}')}: {problem}, got {size!r}"
            for name, size in sizes.items()
            if (
                problem := lacking.get(name)
                or _out_of_range(size, _LEAST.get(name, 1), bounds.get(name) or MOST, _WHY.get(name))
            )
        ]
        rows = prod(size for name, size in sizes.items() if name in ("batch", "beams") and isinstance(size, int))
        if not problems and rows > MOST:
            problems.append(f"--max-batch times --max-beams: expected at most {MOST} rows, got {rows}")
        if problems:
            raise UsageError(explain("engines of these sizes cannot be built:", problems))
        return cls(**sizes)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def profiles_of(graph: GraphSpec, sizes: Sizes, manifest: Manifest, *, alone: bool) -> tuple[Profile, ...]:
    """The profiles of one graph's plan; those of a decoder are for steps and for prefill.

    Args:
        alone: whether one source with one row has a step profile of its own, tuned for it.
    """
    letters = {axis for item in (*graph.inputs, *graph.outputs) for axis in item.axes if isinstance(axis, str)} - {"S"}
    ranges: dict[str, Lengths] = {
        "B": (1, sizes.batch, sizes.batch),
        "R": (1, sizes.batch * sizes.beams, sizes.batch * sizes.beams),
        "N": _samples(manifest),
        **dict.fromkeys(SOURCE_AXES, (1, min(USUAL_SOURCE, sizes.source), sizes.source)),
    }
    one: Lengths = (1, 1, 1)
    prompt: Lengths = (1, max(1, sizes.prompt // 2), sizes.prompt)
    if "Q" not in letters:
        named: dict[str, Mapping[str, Lengths]] = {"encode": ranges}
    else:
        named = {"step": {**ranges, "Q": STEP}, "prefill": {**ranges, "Q": prompt}}
        if alone:
            named = {"single": {**ranges, "Q": STEP, "B": one, "R": one}, **named}
    return tuple(
        Profile(name=name, axes={letter: axes[letter] for letter in sorted(letters)}) for name, axes in named.items()
    )


def _lacking(manifest: Manifest) -> dict[str, str]:
    """The sizes of what no graph of the artifact has, and how to say so."""
    tensors = [item for graph in manifest.graphs.values() for item in (*graph.inputs, *graph.outputs)]
    letters = {axis for item in tensors for axis in item.axes}
    names = f"{' and '.join(manifest.graphs)} {'have' if len(manifest.graphs) > 1 else 'has'}"
    return {
        name: f"leave it out, for this artifact's {names} no {what} ({', '.join(needed)})"
        for name, (needed, what) in _LETTERS.items()
        if letters.isdisjoint(needed)
    }


def _out_of_range(size: Any, least: int, most: int, why: str | None) -> str | None:
    right = type(size) is int and least <= size <= most
    return None if right else f"expected an integer from {least} to {most}{f', which is {why}' if why else ''}"


def _samples(manifest: Manifest) -> Lengths:
    least = _count(manifest.frontend.get("least_samples")) or 1
    most = _count(manifest.frontend.get("most_samples")) or SECONDS * _RATE
    return least, max(least, most // 2), most


def _most_source(manifest: Manifest) -> int | None:
    return _count(manifest.frontend.get("source_positions")) or None


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
