"""Samples: what a model is fed and should answer, one source at a time, made when they are asked for.

Owns what is known of a sample without making it, and what a certificate says of all of them. Where they come from is data.py's.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from txopt.calibration.modalities import Modality
from txopt.calibration.padding import Feeds, Sizes
from txopt.calibration.sources import Source
from txopt.calibration.targets import Ids
from txopt.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One source as a model sees it.

    Args:
        feeds: the encoder's inputs by name, [1,...]; of a decoder alone, its prompt's.
        prompt: int64 [P], what the decoder starts from; empty for a decoder alone, whose ``feeds`` are that, and where there is none.
        labels: int64 [L], what the decoder should say after the prompt (targets.py); None where there is no reference.
        reference: the text of it.
        source: the source, to show.
        where: where it was found.
    """

    feeds: Feeds
    prompt: Ids
    labels: Ids | None
    reference: str | None
    source: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a sample without making it: ``sizes`` that a batch may pad, ``rigid`` ones that it may not.

    ``answer`` is what an encoder alone should answer (classes.py), None where there is no reference.
    """

    source: Source
    digest: bytes
    length: float
    sizes: Sizes
    rigid: tuple[int, ...]
    prompt: Ids
    labels: Ids | None
    answer: NDArray[Any] | None = None

    @property
    def has_reference(self) -> bool:
        return self.labels is not None or self.answer is not None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much data there is: ``places`` are the sources' tokens, or samples of sound; ``seconds`` of sound, else None."""

    found: int
    duplicates: int
    samples: int
    references: int
    places: int
    label_tokens: int
    seconds: float | None


class Samples(Sequence[Sample]):
    """The samples chosen, in the draw's order; each is made when it is asked for.

    Args:
        manifest: of the artifact they are for.
        modality: makes feeds of sources.
        entries: what is known of each.
        counts: of them, and of what they were chosen from.
        options: generation options that belong to all of them, as a forced first token.
        synthetic: whether nobody gave any data.
        notices: what was left out or cut; logged already.
    """

    def __init__(
        self,
        manifest: Manifest,
        modality: Modality,
        entries: Sequence[Entry],
        *,
        counts: Counts,
        options: Mapping[str, Any],
        synthetic: bool,
        notices: Sequence[str],
    ) -> None:
        self.manifest, self.entries, self.counts = manifest, tuple(entries), counts
        self.options, self.synthetic, self.notices = dict(options), synthetic, tuple(notices)
        self._modality = modality

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Sample]": ...
    def __getitem__(self, index: int | slice) -> "Sample | list[Sample]":
        """Raises InputError where a file is gone or damaged since it was checked."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        entry = self.entries[index]
        feeds, _ = feeds_and_prompt(self._modality, entry.source)
        value = entry.source.value
        shown = entry.source.name or (str(value) if isinstance(value, str | Path) else entry.source.where)
        return Sample(
            feeds=feeds,
            prompt=entry.prompt,
            labels=entry.labels,
            reference=entry.source.target,
            source=shown,
            where=entry.source.where,
        )

    def part(self, start: int, stop: int) -> "Samples":
        """The samples from ``start`` to ``stop``, with counts of their own."""
        entries = self.entries[start:stop]
        labels = [entry.labels for entry in entries if entry.labels is not None]
        counts = replace(
            self.counts,
            samples=len(entries),
            references=sum(entry.has_reference for entry in entries),
            places=sum(max(entry.sizes.values(), default=0) for entry in entries),
            label_tokens=sum(map(len, labels)),
            seconds=None if self.counts.seconds is None else round(sum(entry.length for entry in entries), 3),
        )
        return Samples(
            self.manifest,
            self._modality,
            entries,
            counts=counts,
            options=self.options,
            synthetic=self.synthetic,
            notices=self.notices,
        )

    @property
    def sha256(self) -> str:
        """Of what the samples are, sources and references, wherever they lie and in whatever order: 64 hex digits."""
        return hashlib.sha256(b"".join(sorted(entry.digest for entry in self.entries))).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What a certificate says of them."""
        return {"sha256": self.sha256, "synthetic": self.synthetic, **vars(self.counts), "notices": list(self.notices)}


def feeds_and_prompt(modality: Modality, source: Source) -> tuple[Feeds, dict[str, Any]]:
    """The encoder's inputs; a speech model's prompt, int64 [P], is among the options as decoder_input_ids."""
    feeds, options = modality.feeds(source)
    rest = {name: value for name, value in feeds.items() if name != "decoder_input_ids"}
    prompt = feeds.get("decoder_input_ids")
    return rest, dict(options) if prompt is None else {**options, "decoder_input_ids": prompt[0]}
