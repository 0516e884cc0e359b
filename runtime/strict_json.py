"""JSON as artifacts use it: read without mercy, written in one canonical form, and taken apart field by field.

Owns what plain ``json`` lets pass: duplicate keys, NaN, infinities, numbers and strings that no other reader can hold,
endless nesting. Problems are gathered in a list, never raised one by one. It does not know what any document means.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from txopt.runtime.errors import ArtifactError

DEEPEST = 64  # levels; far below the interpreter's recursion limit
_SHOWN = 60  # characters of a foreign value in a message
_LONGEST_PROBLEM, _MOST_PROBLEMS = 400, 40


def show(value: object) -> str:
    """``value`` for a message: its repr, cut to one short line, so that no file can flood or steer a terminal."""
    if isinstance(value, str):
        value = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
    elif isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return ascii(value)[: 2 * _SHOWN]


def limited(problems: Iterable[str]) -> list[str]:
    """As many problems as someone will read, without control characters: an attacker may have chosen the values."""
    every = list(problems)
    left = len(every) - _MOST_PROBLEMS
    lines = every[:_MOST_PROBLEMS] + ([f"... and {left} more"] if left > 0 else [])
    cut = (line if len(line) <= _LONGEST_PROBLEM else line[:_LONGEST_PROBLEM] + "…" for line in lines)
    return ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in cut]


def parse(data: bytes, problems: list[str]) -> object:
    """The document in ``data``; duplicate keys and impossible values are added to ``problems``.

    Raises:
        ArtifactError: ``data`` is not UTF-8 or not JSON, so that there is no document at all.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            problems.append(f"duplicate keys in one object: {', '.join(map(show, twice))}")
        return document

    try:
        document: object = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as err:
        raise ArtifactError(f"expected UTF-8, found byte {data[err.start]:#04x} at offset {err.start}") from err
    except RecursionError as err:
        raise ArtifactError(f"expected at most {DEEPEST} levels of nesting, found more") from err
    except ValueError as err:  # JSONDecodeError, and integers of thousands of digits
        raise ArtifactError(f"expected JSON: {err}") from err
    problems += value_problems(document, "")
    return document


def canonical(document: object) -> bytes:
    """The one form artifacts are written in: sorted keys, two spaces, UTF-8, a trailing newline."""
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def value_problems(value: object, where: str, depth: int = 0) -> Iterable[str]:
    """What keeps ``value`` (found at ``where``) from being JSON that every reader understands alike."""
    if depth > DEEPEST:
        yield f"{where[:_SHOWN]}...: expected at most {DEEPEST} levels of nesting, found more"
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str or not _encodable(key):
                yield f"{where or 'top level'}: expected keys that are Unicode text, found {show(key)}"
            else:
                yield from value_problems(item, f"{where}.{key}" if where else key, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from value_problems(item, f"{where}[{index}]", depth + 1)
    elif type(value) is int:
        if not -(2**63) <= value < 2**63:
            yield f"{where}: expected an integer of 64 bits, found one of {value.bit_length()} bits"
    elif type(value) is float:
        if not math.isfinite(value):
            yield f"{where}: expected a finite number, found {value}"
    elif type(value) is str:
        if not _encodable(value):
            yield f"{where}: expected Unicode text, found a lone surrogate in {show(value)}"
    elif value is not None and type(value) is not bool:
        yield f"{where}: expected a JSON value, found {type(value).__module__}.{type(value).__qualname__}"


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Fields:
    """One JSON object on its way into a dataclass: typed access to its keys, all that is wrong noted in ``problems``.

    A getter whose key is missing or of another type notes that and returns a stand-in of the promised type, so that
    reading goes on and the whole list can be shown. Whoever asks must therefore look at ``problems`` in the end.
    """

    def __init__(self, value: object, where: str, problems: list[str], known: Collection[str]) -> None:
        self.where, self.problems = where, problems
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            problems.append(f"{where or 'the document'}: expected an object, found {show(value)}")
            return
        place = where or "top level"
        unknown = sorted(show(key) for key in value.keys() - set(known))
        missing = sorted(set(known) - value.keys())
        problems += [f"{place}: unknown key {key}; known: {', '.join(sorted(known))}" for key in unknown]
        problems += [f"{place}: expected the key {key!r}, found no such key" for key in missing]

    def text(self, key: str) -> str:
        value: object = self._get(key, (str,), "text")
        if value == "":
            self._wrong(key, "text that is not empty", value)
        return value if isinstance(value, str) else ""

    def choice(self, key: str, options: Collection[str]) -> str:
        value: object = self._values.get(key)
        if key in self._values and (not isinstance(value, str) or value not in options):
            self._wrong(key, f"one of {', '.join(options)}", value)
        return value if isinstance(value, str) else ""

    def count(self, key: str, least: int) -> int:
        value: object = self._get(key, (int,), "an integer")
        if isinstance(value, int) and value < least:
            self._wrong(key, f"an integer of at least {least}", value)
        return value if isinstance(value, int) else least

    def count_or_none(self, key: str, least: int) -> int | None:
        return None if key in self._values and self._values[key] is None else self.count(key, least)

    def mapping(self, key: str) -> dict[str, Any]:
        value: object = self._get(key, (dict,), "an object")
        return dict(value) if isinstance(value, dict) else {}

    def items(self, key: str) -> list[Any]:
        value: object = self._get(key, (list, tuple), "a list")
        return list(value) if isinstance(value, list | tuple) else []

    def get(self, key: str) -> object:
        return self._values.get(key)

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str, types: tuple[type, ...], expected: str) -> object:
        if key not in self._values:
            return None  # noted by the constructor
        value = self._values[key]
        if isinstance(value, types) and type(value) is not bool:  # which Python takes for an integer
            return value
        self._wrong(key, expected, value)
        return None

    def _wrong(self, key: str, expected: str, value: object) -> None:
        self.problems.append(f"{self.path(key)}: expected {expected}, found {show(value)}")
