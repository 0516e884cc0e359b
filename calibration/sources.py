"""Calibration data as a user has it: files of text, tables and lists, any iterable, to sources with where they were found.

Owns the four table formats (.txt, .csv, .jsonl, .tsv) and what an item of an iterable may be. It does not know what a model does
with a source: modalities.py does. Arrays in an .npz are arrays.py's.

    .txt     one source a line, as it is; blank lines are left out
    .csv     a header with "source" and, where there are references, "target"; other columns are left alone
    .jsonl   an object a line, with the same keys
    .tsv     file and, behind a tab, what is said or shown in it; no quotes, no header (one of known names is left out)

Text is UTF-8, with or without a byte order mark, lines end in LF or CRLF. In tables of sounds or images a source is the path of
a file, relative to the table's folder.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from txopt.calibration.problems import Problems
from txopt.runtime.errors import ArtifactError, InputError
from txopt.runtime.strict_json import parse, show

TABLES = {
    "text": (".txt", ".csv", ".jsonl"),
    "audio": (".tsv", ".csv", ".jsonl"),
    "image": (".tsv", ".csv", ".jsonl"),
    "arrays": (),
}
ARRAYS = ".npz"
LONGEST_LINE = 1 << 20  # bytes; what is longer is no line of text
_HEADERS = ("source", "path", "file", "file_name", "audio", "image")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source, not read yet.

    Args:
        where: file and line, or the item's number.
        value: a text, a path, samples, a Pillow image, or arrays by name.
        target: the reference text; None where there is none.
        labels: the reference as numbers, of arrays that have them; as a number or a list of an encoder's (classes.py).
        name: what a table calls a file, relative to its folder; None for what is no file of a table.
    """

    where: str
    value: Any
    target: str | None = None
    labels: Any = None
    name: str | None = None


def of_file(path: Path, kind: str, problems: Problems, *, classes: bool = False) -> Iterator[Source]:
    """The sources of a table; what is wrong with its lines is added to ``problems``, and the rest is read all the same.

    Args:
        kind: what the artifact takes: "text", "audio" or "image".
        classes: whether a reference may be a number, or a list of numbers or texts.

    Raises:
        InputError: no such file, none that this kind of artifact takes, or one that cannot be read.
    """
    suffix = path.suffix.lower()
    check_suffix(path, kind)
    reader = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".tsv": _tsv}[suffix]
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            if start.startswith(_UTF16) or b"\0" in start:
                what = "UTF-16" if start.startswith(_UTF16) else "bytes that are no text"
                raise InputError(f"{path}: expected UTF-8 text, found {what}; save it as UTF-8")
            file.seek(len(_BOM) if start.startswith(_BOM) else 0)
            for source in reader(path, file, problems):
                if source.labels is not None and not classes:
                    problems.add(source.where, f"target: expected text or null, found {show(source.labels)}")
                    continue
                yield source if kind == "text" else _file_of(source, path.parent)
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err


def check_suffix(path: Path, kind: str) -> None:
    """Refuses by its name what is no calibration data for an artifact that takes ``kind``."""
    expected = ", ".join((*TABLES[kind], ARRAYS))
    if not path.is_file():
        raise InputError(
            f"{path}: expected a file ({expected}), found {'a folder' if path.is_dir() else 'no such file'}"
        )
    suffix = path.suffix.lower()
    if suffix not in (*TABLES[kind], ARRAYS):
        hint = {
            "text": "one text a line of a .txt file, or columns source and target of a .csv or .jsonl file",
            "arrays": "its encoder's inputs by name in an .npz file; the artifact has no tokenizer or processor",
        }.get(kind, f"a .tsv file whose lines are the path of an {kind} file, a tab, and the text that belongs to it")
        found = suffix or "a name without a suffix"
        raise InputError(f"{path}: this artifact takes {kind}: expected {expected}, found {found}; give {hint}")


def of_items(items: Iterable[Any], problems: Problems, *, classes: bool = False) -> Iterator[Source]:
    """The sources of an iterable: texts, paths, samples or images; pairs of one and its reference; or mappings.

    A mapping has the keys source and, where there is a reference, target; mappings of arrays are arrays.py's.
    ``classes`` is that of ``of_file``.
    """
    for number, item in enumerate(items):
        where, value, target = f"item {number}", item, None
        if isinstance(item, tuple | list) and len(item) == 2:
            value, target = item
        elif isinstance(item, Mapping) and "source" in item:
            value, target = item["source"], item.get("target")
        if classes and is_classes(target):
            yield Source(where=where, value=value, labels=target)
        elif target is not None and not isinstance(target, str):
            problems.add(where, f"expected a reference text or None, found {type(target).__name__}")
        else:
            yield Source(where=where, value=value, target=target or None)


def is_classes(target: object) -> bool:
    """Whether ``target`` is a number, or a list of numbers or of texts."""
    if isinstance(target, list | tuple):
        return all(isinstance(value, str) for value in target) or all(map(_is_number, target))
    return _is_number(target)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _file_of(source: Source, folder: Path) -> Source:
    return Source(where=source.where, value=folder / source.value, target=source.target, name=source.value)


def _lines(path: Path, file: Any, problems: Problems) -> Iterator[tuple[int, str]]:
    """Lines with their ends, from 1; what is not UTF-8 is a problem, and goes on as what is left of it."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path.name}:{number}"
        if len(line) > LONGEST_LINE:
            problems.add(where, f"expected lines of at most {LONGEST_LINE} bytes, found a longer one; is this text?")
            return
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as err:
            problems.add(where, f"expected UTF-8, found byte {line[err.start]:#04x} at column {err.start + 1}")
            yield number, line.decode("utf-8", "replace")


def _txt(path: Path, file: Any, problems: Problems) -> Iterator[Source]:
    for number, line in _lines(path, file, problems):
        if (text := line.rstrip("\r\n")).strip():
            yield Source(where=f"{path.name}:{number}", value=text)


def _csv(path: Path, file: Any, problems: Problems) -> Iterator[Source]:
    lines = csv.reader((line for _, line in _lines(path, file, problems)), strict=True)
    header: list[str] | None = None
    begun = 1
    try:
        for row in lines:
            where, begun = f"{path.name}:{begun}", lines.line_num + 1
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                if problem := _header_problem(header):
                    problems.add(where, problem)
                    return
            elif len(row) != len(header):
                problems.add(where, f"expected {len(header)} cells, as the header has, found {len(row)}; quote commas")
            else:
                yield from _row(where, dict(zip(header, row, strict=True)), problems)
    except csv.Error as err:
        problems.add(f"{path.name}:{begun}", f"expected cells in whole quotes, found otherwise: {err}")


def _header_problem(header: list[str]) -> str | None:
    found = ", ".join(show(name) for name in header[:8])
    if "source" not in header:
        hint = "; cells are separated by commas" if any(mark in header[0] for mark in ";\t") else ""
        return f'expected a header with "source" and, where there are references, "target", found {found}{hint}'
    if len(set(header)) < len(header):
        return f"expected different names in the header, found {found}"
    return None


def _jsonl(path: Path, file: Any, problems: Problems) -> Iterator[Source]:
    for number, line in _lines(path, file, problems):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        wrong: list[str] = []
        try:
            document = parse(line.encode(), wrong)
        except ArtifactError as err:
            problems.add(where, err)
            continue
        for problem in wrong:
            problems.add(where, problem)
        if not isinstance(document, dict):
            problems.add(where, f'expected an object with "source", found {show(document)}')
        elif not wrong:
            yield from _row(where, document, problems)


def _row(where: str, row: Mapping[str, Any], problems: Problems) -> Iterator[Source]:
    source, target = row.get("source"), row.get("target")
    if not isinstance(source, str) or not source.strip():
        problems.add(where, f"source: expected text, found {show(source) if 'source' in row else 'no such key'}")
    elif is_classes(target):
        yield Source(where=where, value=source, labels=target)
    elif not isinstance(target, str | None):
        problems.add(where, f"target: expected text or null, found {show(target)}")
    else:
        yield Source(where=where, value=source, target=target or None)


def _tsv(path: Path, file: Any, problems: Problems) -> Iterator[Source]:
    for number, line in _lines(path, file, problems):
        where, cells = f"{path.name}:{number}", line.rstrip("\r\n").split("\t")
        name = cells[0].strip()
        if not any(cell.strip() for cell in cells):
            continue
        if number == 1 and name.lower() in _HEADERS and not (path.parent / name).is_file():
            continue
        if len(cells) > 2:
            problems.add(where, f"expected a file, a tab and its text, found {len(cells)} cells")
        elif not name:
            problems.add(where, f"expected a file before the text, found the text {show(cells[1])} alone")
        else:
            yield Source(where=where, value=name, target=cells[1].strip() or None if len(cells) == 2 else None)
