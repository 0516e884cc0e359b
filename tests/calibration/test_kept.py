"""Logits that are kept: the same numbers, computed once while there is room."""

import numpy as np

from txopt.calibration.kept import Kept


def rows(*lengths: int, start: float = 0.0) -> list[np.ndarray]:
    return [np.arange(start, start + 4 * length, dtype=np.float32).reshape(length, 4) for length in lengths]


def test_what_was_computed_once_is_read_again() -> None:
    kept, made = Kept(), []

    def of(indices: tuple[int, ...], *given: np.ndarray) -> list[np.ndarray]:
        return kept.of(indices, lambda: made.append(indices) or given)

    first, second = rows(2, 3), rows(1, 5, start=0.5)
    for _ in range(3):
        for indices, given in (((0, 3), first), ((1, 2), second)):
            for got, expected in zip(of(indices, *given), given, strict=True):
                np.testing.assert_array_equal(got, expected)
    assert made == [(0, 3), (1, 2)]


def test_what_has_no_room_is_computed_every_time() -> None:
    kept, made = Kept(most=2 * 4 * 4), []
    for _ in range(2):
        for index, length in enumerate((3, 2, 1)):
            (got,) = kept.of((index,), lambda index=index, length=length: made.append(index) or rows(length))
            np.testing.assert_array_equal(got, rows(length)[0])
    assert made == [0, 1, 2, 0, 2]
