"""Calibration data in, samples out: what calibration feeds a model, and what the references are, as serving would have them.

Owns the order of things: sources are found (sources.py, arrays.py), measured and drawn (choice.py), each chosen one is prepared once
so that everything that is wrong is known before anything is computed, and hashed. Nothing of a sound or an image is kept: samples
(samples.py) are made when they are asked for. Batches are batches.py's.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from txopt.calibration import arrays as array_data
from txopt.calibration import synthetic
from txopt.calibration.choice import POOL, Candidate, Pool, place, spread
from txopt.calibration.classes import Classes
from txopt.calibration.modalities import Arrays, Modality, Texts, digest_of, modality_of
from txopt.calibration.padding import Padding
from txopt.calibration.problems import Problems
from txopt.calibration.samples import Counts, Entry, Samples, feeds_and_prompt
from txopt.calibration.sources import ARRAYS, Source, check_suffix, of_file, of_items
from txopt.calibration.targets import Ids, Targets, start_of
from txopt.runtime.errors import InputError
from txopt.runtime.frontend import kind_of
from txopt.runtime.model import Model
from txopt.runtime.strict_json import show
from txopt.runtime.text import TextDecoder

logger = logging.getLogger(__name__)

LIMIT = 256  # samples
Progress = Callable[[int, int], None]  # done, of so many


def read(
    data: str | Path | Mapping[str, Any] | Iterable[Any] | None,
    model: Model,
    *,
    limit: int | None = LIMIT,
    seconds: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Samples of ``data`` for ``model``.

    Args:
        data: the path of a .txt, .csv, .jsonl, .tsv or .npz file (sources.py, arrays.py); arrays [n,...] by name; an iterable of
            sources, of (source, reference) pairs, of mappings with source and target, or of arrays of one sample by name; or None:
            random sources, with a warning.
        limit: most samples; None: all there are.
        seconds: of sound at most, of an artifact that takes sound; features in arrays have no seconds, ``limit`` alone bounds these.
        seed: of the draw, and of random sources.
        options: the pipeline's: source_language, target_language; language, task.
        progress: called with what is done and what there is to do, while the chosen ones are read.

    Raises:
        InputError: data that cannot be used, for whatever reasons: the first of them with file and line, the rest counted.
        UsageError: options that this artifact does not have.
        MissingDependencyError: sound or images are to be read and the package for it is missing.
    """
    kind = kind_of(model.manifest.frontend)
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a number of samples of at least 1, or None, found {limit}")
    if seconds is not None and (kind != "audio" or not seconds > 0):
        raise InputError(
            f"seconds={seconds:g}: expected a number above 0, for an artifact that takes audio; it takes {kind}"
        )
    problems, padding = Problems(), Padding(model.manifest)
    name, found, as_arrays = _found(
        data, model, padding, problems, min(limit or synthetic.COUNT, synthetic.COUNT), seed
    )
    modality: Modality = Arrays(padding) if as_arrays or kind == "arrays" else modality_of(model, options or {})
    pool = _measured(found, modality, limit, seed, problems)
    title = f"{name}: these data cannot calibrate this artifact, which takes {kind}:"
    problems.check(title)
    if not pool.found:
        raise InputError(f"{name}: expected at least one source, found none")
    notices = []
    if data is None:
        notices.append(
            f"no calibration data: {pool.found} samples were made up, {synthetic.WHAT[kind]}; ranges found on them are "
            "guesses, and measured losses mean little: give data of your task"
        )
    chosen = spread(pool.candidates(), limit, seconds if modality.unit == "seconds" else None)
    prepared = _Prepared(model, modality, padding)
    for done, candidate in enumerate(chosen):
        prepared.add(candidate, problems)
        if progress is not None:
            progress(done + 1, len(chosen))
    problems.check(title)
    notices += prepared.notices(pool.duplicates)
    for notice in notices:
        logger.warning("%s: %s", name, notice)
    return Samples(
        model.manifest,
        modality,
        prepared.entries,
        counts=prepared.counts(pool, modality.unit),
        options=prepared.options,
        synthetic=data is None,
        notices=notices,
    )


def _found(
    data: Any, model: Model, padding: Padding, problems: Problems, count: int, seed: int
) -> tuple[str, Iterator[Source], bool]:
    """What the data are called, their sources, and whether these are arrays."""
    kind = kind_of(model.manifest.frontend)
    if data is None:
        return "synthetic", synthetic.draw(model, padding, count, seed), False
    if isinstance(data, str | Path):
        path = Path(data)
        check_suffix(path, kind)
        if path.suffix.lower() == ARRAYS:
            return str(path), array_data.of_npz(path, padding, problems), True
        return str(path), of_file(path, kind, problems, classes=model.manifest.kind == "encoder"), False
    if isinstance(data, Mapping):
        return "arrays", array_data.of_mapping(data, "arrays", padding, problems), True
    if not isinstance(data, Iterable) or isinstance(data, bytes | bytearray | np.ndarray):
        raise InputError(
            f"expected a path, an iterable of sources, arrays by name, or None, found {type(data).__name__}"
        )
    items = iter(data)
    first = list(itertools.islice(items, 1))
    every = itertools.chain(first, items)
    if first and isinstance(first[0], Mapping) and "source" not in first[0]:
        rows = (array_data.of_item(number, item, padding, problems) for number, item in enumerate(every))
        return "items", itertools.chain.from_iterable(rows), True
    if kind == "arrays" and first:
        raise InputError(
            f"expected mappings of the encoder's inputs by name, found {show(type(first[0]).__name__)}; "
            "this artifact has no tokenizer or processor"
        )
    return "items", of_items(every, problems, classes=model.manifest.kind == "encoder"), False


def _measured(
    found: Iterable[Source], modality: Modality, limit: int | None, seed: int, problems: Problems
) -> Pool[Source]:
    """Every source looked at, the first of the draw kept."""
    pool: Pool[Source] = Pool(None if limit is None else POOL * limit)
    for source in found:
        try:
            length = modality.length(source)
        except InputError as err:
            problems.add(source.where, err)
            continue
        target = b"" if source.target is None else b"\0" + source.target.encode("utf-8", "surrogatepass")
        identity = modality.identity(source) + target + _bytes_of_labels(source)
        pool.add(Candidate(place=place(seed, identity), length=length, item=source))
    return pool


class _Prepared:
    """The chosen sources, each made a sample once; what is wrong with it goes to the problems."""

    def __init__(self, model: Model, modality: Modality, padding: Padding) -> None:
        self.entries: list[Entry] = []
        self.options: dict[str, Any] = {}
        self._manifest, self._modality, self._padding = model.manifest, modality, padding
        self._digests: set[bytes] = set()
        self._twins = self._cut = self._cut_targets = self._unwritten = 0
        frontend = model.manifest.frontend
        named = "tokenizer" in frontend or "target_tokenizer" in frontend
        self._decoder = TextDecoder(model.artifact.path, frontend) if named else None
        self._classes = Classes(model.manifest) if model.manifest.kind == "encoder" else None

    def add(self, candidate: Candidate[Source], problems: Problems) -> None:
        source = candidate.item
        try:
            entry = self._entry(source, candidate.length)
        except InputError as err:
            problems.add(source.where, err)
            return
        except OSError as err:
            problems.add(source.where, f"cannot be read: {err.strerror or err}")
            return
        if entry.digest in self._digests:
            self._twins += 1
            return
        self._digests.add(entry.digest)
        self.entries.append(entry)

    def counts(self, pool: Pool[Source], unit: str) -> Counts:
        labels = [entry.labels for entry in self.entries if entry.labels is not None]
        return Counts(
            found=pool.found,
            duplicates=pool.duplicates + self._twins,
            samples=len(self.entries),
            references=sum(entry.has_reference for entry in self.entries),
            places=sum(max(entry.sizes.values(), default=0) for entry in self.entries),
            label_tokens=sum(map(len, labels)),
            seconds=round(sum(entry.length for entry in self.entries), 3) if unit == "seconds" else None,
        )

    def notices(self, duplicates: int) -> Iterator[str]:
        said = {
            "sources left out, as they were there before with the same reference": duplicates + self._twins,
            "sources longer than the model reads, and cut as in serving": self._cut,
            "references longer than the model has positions for, and cut": self._cut_targets,
            "references left out, as the model's tokenizer cannot write them": self._unwritten,
        }
        yield from (f"{what}: {number}" for what, number in said.items() if number)

    def _entry(self, source: Source, length: float) -> Entry:
        feeds, options = feeds_and_prompt(self._modality, source)
        given = options.pop("decoder_input_ids", None)
        self.options = options
        prompt, labels = np.zeros(0, np.int64), None
        answer = None if self._classes is None else self._classes.of(source, _tokens(feeds))
        if self._manifest.cache is not None:
            targets = Targets(self._manifest, self._decoder, options)
            if "encoder" in self._manifest.graphs:
                prompt = start_of(self._manifest, options) if given is None else given
            labels = self._labels(targets, source, len(prompt) or feeds["input_ids"].shape[1])
        if isinstance(self._modality, Texts) and self._modality.is_cut(source):
            self._cut += 1
        digest = hashlib.sha256(self._modality.content(source))
        digest.update(b"" if source.target is None else hashlib.sha256(source.target.encode()).digest())
        digest.update(_bytes_of_labels(source))
        return Entry(
            source=source,
            digest=digest.digest(),
            length=length,
            sizes=self._padding.sizes(feeds),
            rigid=self._padding.rigid(feeds),
            prompt=prompt,
            labels=labels,
            answer=answer,
        )

    def _labels(self, targets: Targets, source: Source, prompt: int) -> Ids | None:
        labels = None if source.labels is None else targets.of_ids(source.labels)
        if source.target is not None:
            labels = targets.of_text(source.target)
            self._unwritten += labels is None
        if labels is None:
            return None
        fitting = targets.fitting(labels, prompt)
        self._cut_targets += len(fitting) < len(labels)
        return fitting if len(fitting) else None


def _tokens(feeds: Mapping[str, Any]) -> int:
    """How many places a source has, where these are tokens."""
    return int(feeds["input_ids"].shape[1]) if "input_ids" in feeds else 0


def _bytes_of_labels(source: Source) -> bytes:
    return b"" if source.labels is None else digest_of({array_data.LABELS: np.asarray(source.labels)})
