"""Ranges are read back as they were written, for the key they were made for, and nothing malformed is believed."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txopt.calibration import ranges as module
from txopt.calibration.amax import MSE, Absmax, Entropy, Percentile
from txopt.calibration.histogram import BARS, Histogram
from txopt.calibration.ranges import Key, Range, Ranges, digest_of_files
from txopt.runtime.errors import ArtifactError, InputError, StaleError
from txopt.runtime.strict_json import canonical

KEY = Key.of(graph="a" * 64, data="b" * 64, method=Percentile(), settings={"bins": 4096, "steps": [1, 2]})


def observed(*, channels: int | None = None) -> Histogram:
    made = Histogram("x", channels=channels)
    made.update(np.random.default_rng(0).laplace(size=(500, 4)).astype(np.float32))
    return made


def ranges() -> Ranges:
    tensors = {
        "b/MatMul:0": Range.of(observed(), Percentile(percentile=99)),
        "a é": Range.of(observed(channels=4), MSE()),
        "zeros": replace(Range.of(observed(), Absmax()), amax=0.0, min=0.0, max=0.0, count=3, bars=(3,)),
    }
    return Ranges(key=KEY, tensors=tensors)


def document() -> Any:
    return json.loads(canonical(ranges().to_json()))


# What a range says


@pytest.mark.parametrize("method", [Absmax(), Percentile(), Entropy(), MSE(bits=4)], ids=lambda m: m.name)
@pytest.mark.parametrize("channels", [None, 4])
def test_a_range_says_what_was_seen_and_where_to_clip(method: Any, channels: int | None) -> None:
    made = observed(channels=channels)
    found = Range.of(made, method)
    assert np.array(found.amax).tolist() == method.amax(made).tolist()
    assert np.array(found.min).tolist() == made.min.tolist()
    assert np.array(found.max).tolist() == made.max.tolist()
    assert (found.count, found.method) == (2000, method.name)
    assert len(found.bars) <= BARS
    assert sum(found.bars) == 2000


def test_where_nothing_was_seen_there_is_no_range() -> None:
    with pytest.raises(InputError, match=r"^x: expected values, found none"):
        Range.of(Histogram("x"), Absmax())


# Files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    ranges().save(tmp_path / "made" / "ranges.json")
    assert Ranges.load(tmp_path / "made" / "ranges.json", key=KEY) == ranges()


def test_equal_ranges_are_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    shuffled = replace(
        ranges(),
        tensors=dict(reversed(ranges().tensors.items())),
        key=replace(KEY, settings=dict(reversed(KEY.settings.items()))),
    )
    for name, each in (("one", ranges()), ("other", shuffled), ("again", ranges())):
        each.save(tmp_path / name)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_numbers_survive_to_the_last_bit() -> None:
    numbers = {"amax": 0.1 + 0.2, "min": -float(np.float32(1 / 3)), "max": float(np.nextafter(0.5, 1))}
    exact = replace(ranges().tensors["zeros"], **numbers, bar_width=2.0)  # type: ignore[arg-type]
    again = Ranges.from_json(json.loads(canonical(Ranges(key=KEY, tensors={"x": exact}).to_json())))
    assert again.tensors["x"] == exact


def test_writing_replaces_a_file_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(b"old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.files, "sync", full)
        with pytest.raises(ArtifactError, match=r"ranges\.json: cannot be written: No space left"):
            ranges().save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"
    ranges().save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Ranges.load(path, key=KEY) == ranges()


# Keys


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replace(KEY, graph="c" * 64), ["graph: expected cccccccccccc…, found aaaaaaaaaaaa…"]),
        (replace(KEY, data="c" * 64), ["data: expected cccccccccccc…, found bbbbbbbbbbbb…"]),
        (
            Key.of(graph=KEY.graph, data=KEY.data, method=MSE(), settings={"bins": 4096, "steps": [1, 2]}),
            [
                "method: expected mse, found percentile",
                'settings.mse: expected {"bits": 8}, found none',
                'settings.percentile: expected none, found {"percentile": 99.99}',
            ],
        ),
        (
            Key.of(
                graph=KEY.graph, data="d" * 64, method=Percentile(percentile=99.0), settings={"bins": 2048, "new": None}
            ),
            [
                "data: expected dddddddddddd…, found bbbbbbbbbbbb…",
                "settings.bins: expected 2048, found 4096",
                "settings.new: expected null, found none",
                'settings.percentile: expected {"percentile": 99.0}, found {"percentile": 99.99}',
                "settings.steps: expected none, found [1, 2]",
            ],
        ),
    ],
)
def test_ranges_of_something_else_say_what_differs(tmp_path: Path, changed: Key, expected: list[str]) -> None:
    ranges().save(tmp_path / "ranges.json")
    with pytest.raises(StaleError) as caught:
        Ranges.load(tmp_path / "ranges.json", key=changed)
    title, *lines = str(caught.value).splitlines()
    assert "made from something else" in title
    assert lines == [f"  - {line}" for line in expected]


def test_tuples_in_settings_are_the_lists_they_become(tmp_path: Path) -> None:
    settings = {"bins": 4096, "steps": (1, 2)}
    ranges().save(tmp_path / "ranges.json")
    key = Key.of(graph=KEY.graph, data=KEY.data, method=Percentile(), settings=settings)
    assert Ranges.load(tmp_path / "ranges.json", key=key).tensors == ranges().tensors


def test_a_digest_depends_on_contents_and_their_order(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    digests = [digest_of_files(paths) for paths in ([one, other], [other, one], [one], [other], [])]
    assert len(set(digests)) == 5
    assert all(len(digest) == 64 for digest in digests)
    one.rename(tmp_path / "renamed")
    assert digest_of_files([tmp_path / "renamed", other]) == digests[0]
    with pytest.raises(ArtifactError, match="one: cannot be read"):
        digest_of_files([one])


# Nothing malformed is believed


def put(*path: Any) -> Callable[[Any], None]:
    """A change that puts the last of ``path`` where the others lead."""

    def change(doc: Any) -> None:
        *way, last, value = path
        for key in way:
            doc = doc[key]
        doc[last] = value

    return change


T, B, A = "tensors", "b/MatMul:0", "a é"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("format", 2), "expected ranges of format 1, found format 2"),
        (put("format", True), "expected ranges of format 1, found format True"),
        (lambda doc: doc.pop("key"), "expected the key 'key'"),
        (put("more", 1), "unknown key 'more'"),
        (put("tensors", []), "tensors: expected an object"),
        (put("key", "graph", "A" * 64), "key.graph: expected 64 lowercase hex digits"),
        (put("key", "data", 3), "key.data: expected text, found 3"),
        (put("key", "method", "guess"), "key.method: expected one of absmax"),
        (put("key", "settings", None), "key.settings: expected an object"),
        (put(T, B, 5), "tensors.'b/MatMul:0': expected an object, found 5"),
        (lambda doc: doc[T][B].pop("amax"), "tensors.'b/MatMul:0': expected the key 'amax'"),
        (put(T, B, "amax", "1"), "amax: expected a number, found '1'"),
        (put(T, B, "amax", True), "amax: expected a number, found True"),
        (put(T, B, "amax", None), "amax: expected a number, found None"),
        (put(T, B, "amax", 10**400), "amax: expected an integer of 64 bits"),
        (put(T, B, "amax", float("nan")), "amax: expected a finite number, found nan"),
        (put(T, B, "max", float("inf")), "max: expected a finite number, found inf"),
        (put(T, B, "amax", -0.5), "expected amax from 0 to the largest magnitude"),
        (put(T, B, "amax", 1000.0), "expected amax from 0 to the largest magnitude"),
        (put(T, B, "min", 1000.0), "expected min at most max"),
        (put(T, B, "count", 1999), "expected bars that count 1999 values, found 2000"),
        (put(T, B, "count", 0), "count: expected an integer of at least 1"),
        (put(T, B, "count", 2000.0), "count: expected an integer"),
        (put(T, B, "method", "guess"), "method: expected one of absmax"),
        (put(T, B, "histogram", []), "histogram: expected an object"),
        (put(T, B, "histogram", "bars", [0] * 65), "bars: expected 1 to 64 counts, found 65"),
        (put(T, B, "histogram", "bars", []), "bars: expected 1 to 64 counts, found 0"),
        (put(T, B, "histogram", "bars", [-1, 2001]), "bars: expected counts, found -1"),
        (put(T, B, "histogram", "bars", [2000.0]), "bars: expected counts, found 2000.0"),
        (put(T, B, "histogram", "bars", [2000]), "in the last bar"),
        (put(T, B, "histogram", "bar_width", -1.0), "in the last bar"),
        (put(T, A, "amax", 1.0), "three numbers, or three lists of one length"),
        (put(T, A, "amax", [1.0]), "three numbers, or three lists of one length"),
        (put(T, A, "amax", []), "amax: expected a number for every channel"),
        (put(T, A, "amax", [0.1, 0.1, 0.1, 1000.0]), "channel 3: expected amax from 0"),
        (put(T, A, "amax", [0.1, 0.1, "x", 0.1]), r"amax\[2\]: expected a number, found 'x'"),
    ],
)
def test_malformed_ranges_are_refused(change: Callable[[Any], None], expected: str) -> None:
    doc = document()
    Ranges.from_json(copy.deepcopy(doc))
    change(doc)
    with pytest.raises(ArtifactError, match=expected):
        Ranges.from_json(doc)


@pytest.mark.parametrize("wrong", [None, [], "x", 3])
def test_what_is_no_object_is_refused(wrong: Any) -> None:
    with pytest.raises(ArtifactError, match="expected ranges of format 1"):
        Ranges.from_json(wrong)


def test_everything_wrong_is_said_at_once() -> None:
    doc = document()
    doc["key"]["data"] = "x"
    doc[T][B]["amax"] = -1.0
    del doc[T][A]["min"]
    doc[T]["zeros"]["method"] = 5
    with pytest.raises(ArtifactError) as caught:
        Ranges.from_json(doc)
    assert len(str(caught.value).splitlines()) >= 5


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "expected JSON"),
        (b"\xff", "expected UTF-8"),
        (b'{"format": 1, "format": 1}', "duplicate keys"),
        (b"[" * 100_000, "levels of nesting|expected JSON"),
        (b'{"format": 1, "key": {}, "tensors": NaN}', "finite number"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"(?s)^{path}: .*({expected})") as caught:
        Ranges.load(path, key=KEY)
    assert not isinstance(caught.value, StaleError)
    assert "--ranges takes a file that txopt wrote" in str(caught.value)


def test_missing_linked_and_endless_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranges.json"
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        Ranges.load(path, key=KEY)
    ranges().save(tmp_path / "real.json")
    path.symlink_to(tmp_path / "real.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Ranges.load(path, key=KEY)
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(ArtifactError, match="expected at most 1000 bytes of ranges, found more"):
        Ranges.load(tmp_path / "real.json", key=KEY)
    with pytest.raises(ArtifactError, match="expected at most 1000 bytes of ranges, would be"):
        ranges().save(path)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    wrong = replace(ranges().tensors["zeros"], amax=float("nan"))
    with pytest.raises(ArtifactError, match="finite number"):
        Ranges(key=KEY, tensors={"x": wrong}).save(tmp_path / "ranges.json")
    assert list(tmp_path.iterdir()) == []
