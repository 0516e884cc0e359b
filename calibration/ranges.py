"""Ranges: what calibration found of each tensor, as a JSON file that serves again while graph, data and settings are the same.

Owns the file's keys, what must agree within it, and the key it is stored under. As with manifests, equal ranges are equal
bytes, a file appears whole or not at all, and everything wrong with one is listed at once. It does not know how ranges
are found (histogram.py, amax.py), nor what becomes of them (quantize.py).
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from txopt.calibration.amax import METHODS, Method
from txopt.calibration.histogram import BARS, Histogram
from txopt.runtime import files
from txopt.runtime.errors import ArtifactError, InputError, StaleError, explain
from txopt.runtime.strict_json import Fields, canonical, limited, parse, show, value_problems

FORMAT = 1
LARGEST = 256 << 20  # bytes: thousands of tensors with thousands of channels
_HEX = frozenset("0123456789abcdef")

Bound = float | tuple[float, ...]  # of a tensor, or of each of its channels


@dataclass(frozen=True, kw_only=True)
class Range:
    """What was seen of one tensor, and where to clip it: -amax to amax, in floats.

    ``amax``, ``min`` and ``max`` are numbers, or all three tuples with one number for each channel of the last axis.
    ``amax`` is never larger than the largest magnitude; ``count`` is the number of values, and ``bars`` counts their
    magnitudes in steps of ``bar_width``, at most BARS of them, for plots.
    """

    amax: Bound
    min: Bound
    max: Bound
    count: int
    method: str
    bar_width: float
    bars: tuple[int, ...]

    @classmethod
    def of(cls, histogram: Histogram, method: Method) -> "Range":
        """The range that ``method`` finds in ``histogram``.

        Raises:
            InputError: the histogram is empty, so that there is none.
        """
        if not histogram.count:
            raise InputError(
                f"{histogram.name}: expected values, found none; no calibration sample reaches this tensor"
            )
        width, bars = histogram.bars()
        amax, low, high = (
            tuple(array.tolist()) if array.ndim else float(array)
            for array in (method.amax(histogram), histogram.min, histogram.max)
        )
        return cls(
            amax=amax,
            min=low,
            max=high,
            count=histogram.count,
            method=method.name,
            bar_width=width,
            bars=bars,
        )

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "Range":
        """The range in ``value``, found at ``where``; only to be used if nothing was added to ``problems``."""
        before = len(problems)
        entry = Fields(value, where, problems, ("amax", "min", "max", "count", "method", "histogram"))
        amax, low, high = (_read_bound(entry, key) for key in ("amax", "min", "max"))
        histogram = Fields(entry.get("histogram"), entry.path("histogram"), problems, ("bar_width", "bars"))
        found = cls(
            amax=amax,
            min=low,
            max=high,
            count=entry.count("count", 1),
            method=entry.choice("method", METHODS),
            bar_width=_read_number(histogram.get("bar_width"), histogram.path("bar_width"), problems),
            bars=_read_bars(histogram),
        )
        if len(problems) == before:  # what must agree can only be judged where everything is there
            problems += [f"{where}: {problem}" for problem in found._contradictions()]
        return found

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        return document | {"histogram": {"bar_width": document.pop("bar_width"), "bars": document.pop("bars")}}

    def _contradictions(self) -> Iterable[str]:
        bounds = [each if isinstance(each, tuple) else (each,) for each in (self.amax, self.min, self.max)]
        if len({type(each) for each in (self.amax, self.min, self.max)}) > 1 or len({len(each) for each in bounds}) > 1:
            yield "expected amax, min and max to be three numbers, or three lists of one length"
            return
        for place, (amax, low, high) in enumerate(zip(*bounds, strict=True)):
            channel = f"channel {place}: " if isinstance(self.amax, tuple) else ""
            if low > high:
                yield f"{channel}expected min at most max, found {low} and {high}"
            elif not 0 <= amax <= max(-low, high):
                yield f"{channel}expected amax from 0 to the largest magnitude {max(-low, high, 0.0)}, found {amax}"
        if sum(self.bars) != self.count:
            yield f"expected bars that count {self.count} values, found {sum(self.bars)}"
        absmax = max(max(-low, high) for low, high in zip(*bounds[1:], strict=True))
        if not (len(self.bars) - 1) * self.bar_width <= absmax < len(self.bars) * self.bar_width:
            yield f"expected the largest magnitude {absmax} in the last bar, found {len(self.bars)} of {self.bar_width}"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What ranges were made from: SHA-256 of the graphs' files and of the data (hex), the method, and every other setting."""

    graph: str
    data: str
    method: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, *, graph: str, data: str, method: Method, settings: Mapping[str, Any]) -> "Key":
        """``settings`` are collection's: whatever else the ranges depend on; a method's own are added here."""
        return cls(graph=graph, data=data, method=method.name, settings={**settings, method.name: asdict(method)})

    @classmethod
    def from_json(cls, value: object, problems: list[str]) -> "Key":
        key = Fields(value, "key", problems, ("graph", "data", "method", "settings"))
        found = cls(
            graph=key.text("graph"),
            data=key.text("data"),
            method=key.choice("method", METHODS),
            settings=key.mapping("settings"),
        )
        for name, digest in (("graph", found.graph), ("data", found.data)):
            if digest and not (len(digest) == 64 and set(digest) <= _HEX):
                problems.append(f"key.{name}: expected 64 lowercase hex digits, found {show(digest)}")
        return found

    def differences(self, stored: "Key") -> list[str]:
        """What was asked for here and what ``stored`` has instead; empty where the two are one."""
        different = [
            f"{what}: expected {asked[:12]}…, found {had[:12]}…"
            for what, asked, had in (("graph", self.graph, stored.graph), ("data", self.data, stored.data))
            if asked != had
        ]
        if self.method != stored.method:
            different.append(f"method: expected {self.method}, found {stored.method}")
        return different + [
            f"settings.{name}: expected {_setting(self.settings, name)}, found {_setting(stored.settings, name)}"
            for name in sorted(self.settings.keys() | stored.settings.keys())
            if _setting(self.settings, name) != _setting(stored.settings, name)
        ]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The ranges of a model's tensors, by name, and what they were made from."""

    key: Key
    tensors: Mapping[str, Range]

    @classmethod
    def from_json(cls, document: object) -> "Ranges":
        """The ranges in a parsed JSON document.

        Raises:
            ArtifactError: it has another format; or keys are missing, unknown or of a wrong type, or contradict each other:
                all of that in one message.
        """
        problems = list(value_problems(document, ""))
        found = cls._read(document, problems)
        if problems:
            raise ArtifactError(explain("not valid ranges:", limited(problems)))
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, key: Key) -> "Ranges":
        """The ranges stored at ``path``, if they were made from what ``key`` says.

        Raises:
            StaleError: they were made from another graph, other data or other settings; it says which.
            ArtifactError: as ``open``.
        """
        found = cls.open(path)
        if different := key.differences(found.key):
            title = f"{path}: these ranges were made from something else; name another file, or delete it to calibrate again:"
            raise StaleError(explain(title, different))
        return found

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Ranges":
        """The ranges stored at ``path``, whatever they were made from.

        Raises:
            ArtifactError: there is no such file, or it is not one that ``save`` wrote: damaged, changed or unsafe.
        """
        path = Path(path)
        try:
            data = files.read(path, LARGEST + 1)
        except OSError as err:
            raise ArtifactError(f"{path}: cannot be read: {err.strerror or err}") from err
        if len(data) > LARGEST:
            raise ArtifactError(f"{path}: expected at most {LARGEST} bytes of ranges, found more")
        problems: list[str] = []
        try:
            document = parse(data, problems)
            found = cls._read(document, problems)
        except ArtifactError as err:
            raise ArtifactError(
                f"{path}: {err}; --ranges takes a file that txopt wrote, or a path where there is none yet"
            ) from err
        if problems:
            raise ArtifactError(
                explain(
                    f"{path}: not valid ranges; --ranges takes a file that txopt wrote, or a path where there is none yet:",
                    limited(problems),
                )
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The document that ``from_json`` reads back.

        Raises:
            ArtifactError: a value is not JSON, or ``from_json`` would refuse the document.
        """
        tensors = {name: found.to_json() for name, found in self.tensors.items()}
        document = {"format": FORMAT, "key": asdict(self.key), "tensors": tensors}
        Ranges.from_json(document)
        return document

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path``, replacing what is there at once: a reader, or a crash, sees the old file or the new one.

        Missing parents are made.

        Raises:
            ArtifactError: as ``to_json``, or the file cannot be written.
        """
        path, data = Path(path), canonical(self.to_json())
        if len(data) > LARGEST:
            raise ArtifactError(f"{path}: expected at most {LARGEST} bytes of ranges, would be {len(data)}")
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(data)
                files.sync(draft)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            files.sync(path.parent)
        except OSError as err:
            raise ArtifactError(f"{path}: cannot be written: {err.strerror or err}") from err

    @classmethod
    def _read(cls, document: object, problems: list[str]) -> "Ranges":
        version = document.get("format") if isinstance(document, dict) else None
        if version != FORMAT or type(version) is not int:  # another format's keys cannot be judged
            raise ArtifactError(f"expected ranges of format {FORMAT}, found format {show(version)}")
        top = Fields(document, "", problems, ("format", "key", "tensors"))
        key = Key.from_json(top.get("key"), problems)
        found = {
            name: Range.from_json(value, f"tensors.{show(name)}", problems)
            for name, value in top.mapping("tensors").items()
        }
        return cls(key=key, tensors=found)


def digest_of_files(paths: Iterable[Path]) -> str:
    """One SHA-256, in hex, of the files' contents in this order, whatever their names: a graph and its weights, say.

    Raises:
        ArtifactError: a file cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        try:
            whole.update(files.sha256(path)[1].encode())
        except OSError as err:
            raise ArtifactError(f"{path}: cannot be read: {err.strerror or err}") from err
    return whole.hexdigest()


def _setting(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "none"


def _read_bound(entry: Fields, key: str) -> Bound:
    value, where, problems = entry.get(key), entry.path(key), entry.problems
    if not isinstance(value, list | tuple):
        return _read_number(value, where, problems)
    if not value:
        problems.append(f"{where}: expected a number for every channel, found none")
    return tuple(_read_number(each, f"{where}[{place}]", problems) for place, each in enumerate(value))


def _read_number(value: object, where: str, problems: list[str]) -> float:
    """A number; those that are not finite are noted where the document is parsed, not here."""
    if type(value) is float or (type(value) is int and value.bit_length() <= 64):
        return float(value)
    problems.append(f"{where}: expected a number, found {show(value)}")
    return 0.0


def _read_bars(histogram: Fields) -> tuple[int, ...]:
    bars = histogram.items("bars")
    if not 1 <= len(bars) <= BARS:
        histogram.problems.append(f"{histogram.path('bars')}: expected 1 to {BARS} counts, found {len(bars)}")
    wrong = [bar for bar in bars if type(bar) is not int or bar < 0]
    histogram.problems += [f"{histogram.path('bars')}: expected counts, found {show(bar)}" for bar in wrong]
    return tuple(bar for bar in bars if type(bar) is int)
