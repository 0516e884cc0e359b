"""Files of sources as people have them: what is read, and what is told of those that cannot be."""

from pathlib import Path

import pytest

from txopt.calibration.problems import SHOWN, Problems
from txopt.calibration.sources import LONGEST_LINE, Source, of_file, of_items
from txopt.runtime.errors import InputError

Row = tuple[str, str | None]


def rows(path: Path, kind: str = "text") -> list[Row]:
    problems = Problems()
    found = [(source.name or source.value, source.target) for source in of_file(path, kind, problems)]
    problems.check("wrong:")
    return found


def write(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


READ: dict[str, tuple[str, bytes, list[Row]]] = {
    "lines, as they are": ("a.txt", b" cat \n\n  \ndog", [(" cat ", None), ("dog", None)]),
    "lines of Windows, with a mark": ("a.txt", b"\xef\xbb\xbfcat\r\ndog\r\n", [("cat", None), ("dog", None)]),
    "other line ends are text": ("a.txt", "a\u2028b\x0bc\n".encode(), [("a\u2028b\x0bc", None)]),
    "quotes of a text are text": ("a.txt", b'"cat"\n', [('"cat"', None)]),
    "columns in any order": ("a.csv", b"target,id,source\nK,1,cat\n,2,dog\n", [("cat", "K"), ("dog", None)]),
    "no references": ("a.csv", b"source\ncat\n", [("cat", None)]),
    "quoted cells of several lines": (
        "a.csv",
        b'\xef\xbb\xbfsource,target\r\n"a ""b"", c\r\nd",e\r\n\r\nf,g\r\n',
        [('a "b", c\r\nd', "e"), ("f", "g")],
    ),
    "objects": (
        "a.jsonl",
        b'\xef\xbb\xbf{"source": "cat", "target": null}\r\n\n{"target": "D", "source": "\\u00e4", "id": 7}',
        [("cat", None), ("ä", "D")],
    ),
    "a suffix in upper case": ("A.TXT", b"cat", [("cat", None)]),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path) -> None:
    name, content, expected = READ[case]
    assert rows(write(tmp_path, name, content)) == expected


def test_files_of_sounds_lie_beside_their_table(tmp_path: Path) -> None:
    table = write(tmp_path, "a.tsv", b'a.wav\tsaid "so"\r\nsub/b.wav\n\nc.wav\t\n')
    found = list(of_file(table, "audio", Problems()))
    assert [source.value for source in found] == [tmp_path / "a.wav", tmp_path / "sub/b.wav", tmp_path / "c.wav"]
    assert [source.target for source in found] == ['said "so"', None, None]
    assert [source.where for source in found] == ["a.tsv:1", "a.tsv:2", "a.tsv:4"]


def test_a_header_of_a_tsv_is_none_of_its_files(tmp_path: Path) -> None:
    table = write(tmp_path, "a.tsv", b"path\tsentence\na.wav\tsaid\n")
    assert rows(table, "audio") == [("a.wav", "said")]
    (tmp_path / "path").touch()
    assert rows(table, "audio") == [("path", "sentence"), ("a.wav", "said")]


WRONG: dict[str, tuple[str, bytes, list[str]]] = {
    "not UTF-8": (
        "a.txt",
        b"caf\xe9\ncat\n\xff\n",
        [
            "a.txt:1: expected UTF-8, found byte 0xe9 at column 4",
            "a.txt:3: expected UTF-8, found byte 0xff at column 1",
        ],
    ),
    "UTF-16": ("a.txt", "cat".encode("utf-16"), ["found UTF-16; save it as UTF-8"]),
    "sound by a text's name": ("a.txt", b"RIFF\x00\x00WAVE", ["found bytes that are no text"]),
    "one endless line": ("a.txt", b"a" * (LONGEST_LINE + 1), ["a.txt:1: expected lines of at most 1048576 bytes"]),
    "no header": ("a.csv", b"cat,K\ndog,D\n", ['a.csv:1: expected a header with "source"', "found 'cat', 'K'"]),
    "semicolons": ("a.csv", b"source;target\ncat;K\n", ["found 'source;target'; cells are separated by commas"]),
    "a name twice": ("a.csv", b"source,source\na,b\n", ["a.csv:1: expected different names in the header"]),
    "ragged": (
        "a.csv",
        b'source,target\na,b,c\n"x\ny",z\nd\n,e\n',
        [
            "a.csv:2: expected 2 cells, as the header has, found 3",
            "a.csv:5: ",
            "found 1",
            "a.csv:6: source: expected text",
        ],
    ),
    "an open quote": ("a.csv", b'source\na\n"b\nc\n', ["a.csv:3: expected cells in whole quotes"]),
    "no objects": (
        "a.jsonl",
        b'{"source": "a"\n["a"]\n{"text": "a"}\n{"source": 5}\n{"source": "a", "target": 5}\n{"source": "a", "source": "b"}\n',
        [
            "a.jsonl:1: expected JSON",
            'a.jsonl:2: expected an object with "source", found a list of 1',
            "a.jsonl:3: source: expected text, found no such key",
            "a.jsonl:4: source: expected text, found 5",
            "a.jsonl:5: target: expected text or null, found 5",
            "a.jsonl:6: duplicate keys",
        ],
    ),
    "a lone surrogate": ("a.jsonl", b'{"source": "\\ud800"}\n', ["a.jsonl:1: source: expected Unicode text"]),
    "texts without files": (
        "a.tsv",
        b"a.wav\tb\n\tsaid\nc.wav\td\te\n",
        ["a.tsv:2: expected a file before the text, found the text 'said' alone", "a.tsv:3: ", "found 3 cells"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_lines_all_at_once(case: str, tmp_path: Path) -> None:
    name, content, parts = WRONG[case]
    with pytest.raises(InputError) as raised:
        rows(write(tmp_path, name, content), "audio" if name.endswith("tsv") else "text")
    message, place = str(raised.value), 0
    for part in parts:
        place = message.index(part, place)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.wav", "text", "takes text: expected .txt, .csv, .jsonl, .npz, found .wav; give one text a line"),
        ("a.tsv", "text", "takes text: expected .*found .tsv"),
        ("a.txt", "audio", "takes audio: expected .tsv, .csv, .jsonl, .npz, found .txt; give a .tsv file whose lines"),
        ("a.wav", "audio", "found .wav; give a .tsv file"),
        ("a.txt", "arrays", "takes arrays: expected .npz, found .txt; give its encoder's inputs by name"),
        ("plain", "image", "found a name without a suffix"),
    ],
)
def test_a_file_of_another_kind_is_told_what_to_give(name: str, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        rows(write(tmp_path, name, b"a\n"), kind)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such file"):
        rows(tmp_path / "none.txt")
    with pytest.raises(InputError, match="found a folder"):
        rows(tmp_path)


def test_of_many_problems_the_first_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        rows(write(tmp_path, "a.jsonl", b"no\n" * 1000))
    lines = str(raised.value).splitlines()
    assert lines[1].startswith("  - a.jsonl:1: ")
    assert lines[-1] == f"  - ... and {1000 - SHOWN} more"
    assert len(lines) == SHOWN + 2


def test_problems_are_shown_without_control_characters(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        rows(write(tmp_path, "a.csv", b"a\x1b[2Jb\n"))
    assert "\x1b" not in str(raised.value)


def test_items_of_any_iterable() -> None:
    problems = Problems()
    items = ["cat", ("dog", "D"), ["frog", None], {"source": "a", "target": "b", "id": 1}, {"source": "c"}]
    found = list(of_items((item for item in items), problems))
    expected = [("cat", None), ("dog", "D"), ("frog", None), ("a", "b"), ("c", None)]
    assert found == [
        Source(where=f"item {number}", value=value, target=target) for number, (value, target) in enumerate(expected)
    ]
    assert not problems.count
    assert len(list(of_items([("a", 5), "b", ("c", ["d"])], problems))) == 1
    assert problems.lines == [
        "item 0: expected a reference text or None, found int",
        "item 2: expected a reference text or None, found list",
    ]
