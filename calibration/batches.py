"""Samples of like lengths together, padded: what a decode loop is fed, batch by batch.

Owns the buckets and what a batch is. Only one batch is in memory at a time; samples are made when their batch comes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from txopt.calibration.padding import Feeds, Padding
from txopt.calibration.samples import Entry, Samples
from txopt.calibration.targets import IGNORED, Ids
from txopt.runtime.counts import count


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples.

    Args:
        indices: which of the samples.
        feeds: the encoder's inputs [B,...]; of a decoder alone, its prompts', padded on the left.
        prompt: int64 [B,P], what the decoder starts from; P is 0 for a decoder alone.
        labels: int64 [B,L], padded on the right with -100; None: no sample of the batch has a reference.
    """

    indices: tuple[int, ...]
    feeds: Feeds
    prompt: Ids
    labels: Ids | None

    @property
    def lengths(self) -> Ids:
        """int64 [B], labels of each sample."""
        return np.zeros(len(self.indices), np.int64) if self.labels is None else (self.labels != IGNORED).sum(1)


def batches(samples: Samples, size: int, *, progress: Callable[[int, int], None] | None = None) -> Iterator[Batch]:
    """Every sample once, in batches of at most ``size``, the longest first: memory is largest in the beginning.

    Samples with and without references are apart, and so are those whose feeds have lengths that no mask is about and that differ.

    Args:
        progress: called after each batch's use with samples done, and samples there are.

    Raises:
        InputError: a file is gone or damaged since it was read first. UsageError: a ``size`` that is none.
    """
    size = count("size", size)
    padding, done = Padding(samples.manifest), 0
    for indices in _buckets(samples.entries, size):
        made = [samples[index] for index in indices]
        labelled = [sample.labels for sample in made if sample.labels is not None]
        yield Batch(
            indices=indices,
            feeds=padding.together([sample.feeds for sample in made]),
            prompt=np.stack([sample.prompt for sample in made]),
            labels=_padded(labelled) if labelled else None,
        )
        done += len(indices)
        if progress is not None:
            progress(done, len(samples))


def _buckets(entries: tuple[Entry, ...], size: int) -> Iterator[tuple[int, ...]]:
    def alike(index: int) -> tuple[object, ...]:
        entry = entries[index]
        return entry.labels is None, len(entry.prompt), entry.rigid

    def longest_first(index: int) -> tuple[int, ...]:
        entry = entries[index]
        labels = 0 if entry.labels is None else len(entry.labels)
        return -max(entry.sizes.values(), default=0), -labels, index

    groups: dict[tuple[object, ...], list[int]] = {}
    for index in sorted(range(len(entries)), key=longest_first):
        groups.setdefault(alike(index), []).append(index)
    for group in groups.values():
        for first in range(0, len(group), size):
            yield tuple(group[first : first + size])


def _padded(rows: list[Ids]) -> Ids:
    labels = np.full((len(rows), max(map(len, rows))), IGNORED, np.int64)
    for padded, row in zip(labels, rows, strict=True):
        padded[: len(row)] = row
    return labels
