"""Values of options, converted or refused with what was expected in words: integers, numbers, flags, and lists of them.

Owns what counts as which in Python: True is no integer, "8" no number. It does not know what any option means.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from operator import index
from typing import Any

from txopt.runtime.errors import UsageError, explain

LARGEST = 2**63 - 1  # ids and lengths are int64

Converter = Callable[[Any], Any]


def integer(minimum: int | None = None, largest: int | None = LARGEST) -> Converter:
    """An integer of any type (numpy's too) in these bounds; None: no bound."""
    expected = "an integer" if minimum is None else f"an integer, at least {minimum}"

    def convert(value: Any) -> int:
        try:
            number = index(value)
        except TypeError:
            raise ValueError(expected) from None
        if isinstance(value, bool) or (minimum is not None and number < minimum):
            raise ValueError(expected)
        if largest is not None and abs(number) > largest:
            raise ValueError(f"{expected}, at most {largest}")
        return number

    return convert


def number(expected: str, holds: Callable[[float], bool]) -> Converter:
    """A float of which ``holds`` is true, ``expected`` in words."""

    def convert(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(expected) from None
        if isinstance(value, bool | str) or not holds(number):
            raise ValueError(expected)
        return number

    return convert


def flag(value: Any) -> bool:
    """True or False, numpy's too."""
    if value not in (True, False):
        raise ValueError("True or False")
    return bool(value)


def several(convert: Converter, expected: str, least: int = 0) -> Converter:
    """A tuple of what ``convert`` takes, at least ``least`` of them, ``expected`` in words."""

    def convert_all(values: Any) -> tuple[Any, ...]:
        try:
            converted = tuple(convert(value) for value in values)
        except (TypeError, ValueError):
            raise ValueError(expected) from None
        if len(converted) < least:
            raise ValueError(expected)
        return converted

    return convert_all


def convert(
    values: Mapping[str, Any], converters: Mapping[str, Converter], optional: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """``values`` converted, each by the converter of its name, and everything that is wrong with them.

    Args:
        converters: raise ValueError with what they expect.
        optional: names whose value may be None, which stays.
    """
    converted: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        try:
            converted[name] = None if value is None and name in optional else converters[name](value)
        except ValueError as err:
            problems.append(f"{name}: expected {err}, got {value!r}")
    return converted, problems


def convert_fields(options: Any, converters: Mapping[str, Converter], title: str) -> None:
    """Converts every field of a frozen dataclass that was just made; those whose default is None may be None.

    Raises:
        UsageError: all that is wrong, below ``title``.
    """
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    converted, problems = convert(
        values, converters, [field.name for field in fields(options) if field.default is None]
    )
    if problems:
        raise UsageError(explain(title, problems))
    for name, value in converted.items():
        object.__setattr__(options, name, value)
