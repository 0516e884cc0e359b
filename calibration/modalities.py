"""What a source is to a model that takes text, sound, images or arrays: its length, its identity, its bytes, its feeds.

Owns the step from a source to feeds, which is the artifact's own front end (runtime/pipeline.py), so that calibration sees what
serving sees. Nothing is kept: sounds and images are read when they are asked for. It does not choose or batch.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from txopt.calibration.arrays import width
from txopt.calibration.padding import Feeds, Padding
from txopt.calibration.sources import Source
from txopt.runtime.audio import duration
from txopt.runtime.errors import InputError
from txopt.runtime.frontend import kind_of
from txopt.runtime.model import Model
from txopt.runtime.pipeline import Pipeline
from txopt.runtime.strict_json import show
from txopt.runtime.text import TextFrontend

Options = dict[str, Any]
_MEDIA = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Modality(Protocol):
    """``unit`` is what ``length`` counts."""

    unit: str

    def length(self, source: Source) -> float:
        """How long a source is, without reading all of it; InputError where it is none that the model takes."""

    def identity(self, source: Source) -> bytes:
        """What tells a source from others, for the draw."""

    def content(self, source: Source) -> bytes:
        """SHA-256 of what a source is, wherever it lies."""

    def feeds(self, source: Source) -> tuple[Feeds, Options]:
        """The encoder's inputs [1,...] as serving makes them, and generation options that came with them."""


class Texts:
    """``cut``: how many of the texts whose feeds were asked for are longer than the model reads, and were cut as in serving."""

    unit = "characters"

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        self._pipeline, self._options = Pipeline(model, "text"), dict(options)
        frontend = model.manifest.frontend
        self._limit: int | None = frontend.get("max_source_length")
        self._whole = TextFrontend(model.artifact.path, {**frontend, "max_source_length": None})

    def length(self, source: Source) -> float:
        text = source.value
        if not isinstance(text, str):
            raise InputError(f"expected a text, as this artifact takes, found {type(text).__name__}")
        if not text.strip():
            raise InputError("expected a text, found nothing but spaces")
        if text.lower().endswith(_MEDIA) and not any(map(str.isspace, text)):
            raise InputError(f"expected a text, found the name of a file, {show(text)}: this artifact reads text alone")
        return float(len(text))

    def identity(self, source: Source) -> bytes:
        return bytes(source.value.encode("utf-8", "surrogatepass"))

    def content(self, source: Source) -> bytes:
        return hashlib.sha256(self.identity(source)).digest()

    def feeds(self, source: Source) -> tuple[Feeds, Options]:
        with _quiet("txopt.runtime.text"):
            return self._pipeline.prepare([source.value], **self._options)

    def is_cut(self, source: Source) -> bool:
        """Whether serving cuts this text, as it is longer than the model reads."""
        if self._limit is None:
            return False
        source_language, target_language = (self._options.get(f"{side}_language") for side in ("source", "target"))
        whole = self._whole.encode([source.value], source_language=source_language, target_language=target_language)
        return whole["input_ids"].size > self._limit


class Files:
    """Sounds or images: files, or what a program has in their place."""

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        self._pipeline, self._options = Pipeline(model), dict(options)
        self._takes, frontend = self._pipeline.kind, model.manifest.frontend
        self.unit = "seconds" if self._takes == "audio" else "images"
        self._rate = frontend.get("sampling_rate", 1)
        most = frontend.get("most_samples")
        self._least = (frontend.get("least_samples") or 0) / self._rate
        self._longest = frontend.get("chunk_length") or (None if most is None else most / self._rate)

    def length(self, source: Source) -> float:
        value = source.value
        path = isinstance(value, str | Path)
        if path and not Path(value).is_file():
            what = "a folder" if Path(value).is_dir() else "no such file"
            raise InputError(
                f"expected the path of an {self._takes} file, found {what}: {show(source.name or str(value))}"
            )
        if self._takes == "image":
            return 1.0
        if not path and not isinstance(value, np.ndarray):
            raise InputError(f"expected a path or a float array of samples, found {type(value).__name__}")
        seconds = duration(value) if path else value.size / self._rate
        if seconds < self._least:
            raise InputError(
                f"expected at least {self._least:g} s, of which the model makes a frame, found {seconds:g}"
            )
        if self._longest is not None and seconds > self._longest:
            raise InputError(
                f"expected at most {self._longest:g} s, all that the model hears at once, found {seconds:.2f}"
            )
        return float(seconds)

    def identity(self, source: Source) -> bytes:
        if isinstance(source.value, str | Path):
            return (source.name or str(source.value)).encode("utf-8", "surrogatepass")
        return self.content(source)

    def content(self, source: Source) -> bytes:
        value = source.value
        if isinstance(value, str | Path):
            with Path(value).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        if isinstance(value, np.ndarray):
            return digest_of({"samples": value})
        return digest_of({value.mode: np.asarray(value)})  # a Pillow image

    def feeds(self, source: Source) -> tuple[Feeds, Options]:
        feeds, options = self._pipeline.prepare([source.value], **self._options)
        return feeds, options


class Arrays:
    """The encoder's inputs themselves."""

    unit = "places"

    def __init__(self, padding: Padding) -> None:
        self._padding = padding

    def length(self, source: Source) -> float:
        return width(source.value, self._padding)

    def identity(self, source: Source) -> bytes:
        return self.content(source)

    def content(self, source: Source) -> bytes:
        return digest_of(source.value)

    def feeds(self, source: Source) -> tuple[Feeds, Options]:
        return source.value, {}


def modality_of(model: Model, options: Mapping[str, Any]) -> Texts | Files:
    """The artifact's own; not for one that takes arrays."""
    return Texts(model, options) if kind_of(model.manifest.frontend) == "text" else Files(model, options)


def digest_of(arrays: Mapping[str, Any]) -> bytes:
    """SHA-256 of arrays by name, of their types and shapes, in the byte order of the format."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        plain = np.ascontiguousarray(value)
        digest.update(f"{name}\0{plain.dtype.newbyteorder('<').str}\0{list(plain.shape)}\0".encode())
        digest.update(plain.astype(plain.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.digest()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the front end's warning of each text that it cuts: one notice says how many."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
