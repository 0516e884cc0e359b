"""References of an encoder alone: what data say is right, as its answers are judged (heads.chosen).

What targets.py is to models that generate. A reference is a text, or a number or a list where the data has these:

| head | reference | becomes |
|---|---|---|
| label | a label's name, or its number | int64 [1] |
| labels | names of those that apply, separated by commas or in a list; or a list of a 0 or a 1 for each label | bool [C] |
| tokens | a list of the number of each token's label, -100 where it does not count | int64 [P] |
| numbers | one number, or a list of as many as the model gives; in text separated by commas | float64 [C] |
| embedding | none: no vector is right | |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.heads import Head, head_of
from txopt.calibration.sources import Source
from txopt.calibration.targets import IGNORED
from txopt.runtime.errors import InputError
from txopt.runtime.manifest import Manifest
from txopt.runtime.strict_json import show

_SHOWN = 8  # labels in a message
_LONGEST = 10  # digits of a label's number


class Classes:
    """References of the artifact that ``manifest`` describes, an encoder alone."""

    def __init__(self, manifest: Manifest) -> None:
        self._head = head_of(manifest)
        outputs = {item.name: item.axes for item in manifest.graphs["encoder"].outputs}
        self._count = int(outputs.get("logits", (0,))[-1])
        named = manifest.frontend.get("labels") or {}
        self._names = [named.get(str(index), str(index)) for index in range(self._count)]

    def of(self, source: Source, places: int) -> NDArray[Any] | None:
        """The reference of ``source``, a text of so many tokens (``places``) or arrays; None where it has none.

        Raises:
            InputError: it is none of this model.
        """
        given = source.target if source.labels is None else source.labels
        if given is None or self._head is None:
            return None
        try:
            return self._read(self._head, given, places)
        except InputError as err:
            raise InputError(f"{'labels' if isinstance(source.value, Mapping) else 'target'}: {err}") from err

    def _read(self, head: Head, given: Any, places: int) -> NDArray[Any]:
        if head is Head.EMBEDDING:
            raise InputError("expected none, as no embedding is right or wrong; leave it out")
        if head is Head.TOKENS:
            return self._tokens(given, places)
        read = {Head.LABEL: self._label, Head.LABELS: self._labels, Head.NUMBERS: self._numbers}
        return read[head](given)

    def _label(self, given: Any) -> NDArray[Any]:
        return np.array([self._index(_one(given))], np.int64)

    def _labels(self, given: Any) -> NDArray[Any]:
        values = _list(given)
        applies = np.zeros(self._count, bool)
        if values and not any(isinstance(value, str) for value in values):
            if len(values) != self._count or not all(value in (0, 1) for value in values):
                raise InputError(
                    f"expected a 0 or a 1 for each of {self._count} labels, or their names, found {_shown(given)}"
                )
            return np.array(values, bool)
        whole = isinstance(given, str) and given in self._names  # whose name may have a comma
        applies[[self._index(name) for name in ([given] if whole else values)]] = True
        return applies

    def _tokens(self, given: Any, places: int) -> NDArray[Any]:
        values = _list(given)
        if isinstance(given, str) or not all(_is_whole(value) for value in values):
            raise InputError(
                "expected the number of each token's label, which text does not have; leave it out, and tokens are "
                f"compared with fp32's, or give arrays with labels [n,T]; found {_shown(given)}"
            )
        wrong = [value for value in values if value != IGNORED and not 0 <= value < self._count]
        if wrong:
            raise InputError(f"expected 0 to {self._count - 1}, or {IGNORED}, found {_shown(wrong[0])}")
        return _cropped(np.array(values, np.int64), places)

    def _numbers(self, given: Any) -> NDArray[Any]:
        values = _list(given)
        try:
            numbers = [float(value) for value in values]
        except (ValueError, OverflowError):
            numbers = []
        if len(numbers) != self._count or not all(map(math.isfinite, numbers)):
            expected = "a number" if self._count == 1 else f"{self._count} numbers"
            raise InputError(f"expected {expected}, as the model gives, found {_shown(given)}")
        return np.array(numbers, np.float64)

    def _index(self, value: Any) -> int:
        """Which label ``value`` is the name or, if none is called so, the number of."""
        value = value.strip() if isinstance(value, str) else value
        if value in self._names:
            return self._names.index(value)
        number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < _LONGEST else value
        if _is_whole(number) and 0 <= number < self._count:
            return int(number)
        more = f", ... ({self._count} in all)" if self._count > _SHOWN else ""
        known = ", ".join(self._names[:_SHOWN])
        raise InputError(f"expected a label, one of {known}{more}, or its number; found {_shown(value)}")


def _list(given: Any) -> list[Any]:
    """A list of what is given: a text's parts between commas, an array's numbers, or one thing alone."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    values = given if isinstance(given, Sequence) else np.atleast_1d(given)
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _one(given: Any) -> Any:
    """The thing itself, of a list of one, too."""
    if isinstance(given, str):
        return given
    values = _list(given)
    return values[0] if len(values) == 1 else given


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cropped(row: NDArray[np.int64], places: int) -> NDArray[np.int64]:
    """``row`` without what stands for padding, behind or before ``places`` of them."""
    more = len(row) - places
    if more >= 0 and (row[places:] == IGNORED).all():
        return row[:places]
    if more >= 0 and (row[:more] == IGNORED).all():
        return row[more:]
    raise InputError(f"expected one for each of {places} tokens, and {IGNORED} for padding, found {len(row)} in all")


def _shown(given: Any) -> str:
    return show(given.tolist() if isinstance(given, np.ndarray) else given)
