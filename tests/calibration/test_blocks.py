"""Blocks and schemes: what a code stands for, and which weights are refused."""

import re

import numpy as np
import pytest

from txopt.calibration.blocks import Blocks, BlockScheme, as_matrix, dequantize
from txopt.runtime.errors import SourceError, UsageError


@pytest.mark.parametrize(
    ("bits", "symmetric", "codes"),
    [(8, True, (-127, 127)), (4, True, (-8, 7)), (8, False, (0, 255)), (4, False, (0, 15))],
)
def test_a_scheme_says_its_codes(bits: int, symmetric: bool, codes: tuple[int, int]) -> None:
    scheme = BlockScheme(bits=bits, symmetric=symmetric)
    assert (scheme.lowest, scheme.highest) == codes


def test_a_last_block_may_be_short() -> None:
    scheme = BlockScheme(block=16)
    assert list(scheme.spans(35)) == [slice(0, 16), slice(16, 32), slice(32, 35)]
    assert [scheme.count(rows) for rows in (1, 16, 17, 35)] == [1, 1, 2, 3]


def test_a_scheme_that_does_not_exist_is_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(UsageError) as error:
        BlockScheme(bits=5, block=48)
    assert "bits: expected 4 or 8, got 5" in str(error.value)
    assert "block: expected 16, 32, 64, 128 or 256 rows, got 48" in str(error.value)


def test_a_symmetric_code_stands_for_code_times_scale() -> None:
    codes = np.array([[-127], *[[1]] * 15, [3]], np.int8)
    blocks = Blocks(codes, np.array([[0.5], [2]], np.float32), None, BlockScheme(block=16))
    assert dequantize(blocks).ravel().tolist() == [-63.5, *[0.5] * 15, 6]


def test_an_asymmetric_code_stands_for_its_distance_from_the_zero_point_times_scale() -> None:
    codes = np.array([[0], *[[255]] * 15, [3]], np.uint8)
    scheme = BlockScheme(block=16, symmetric=False)
    blocks = Blocks(codes, np.array([[0.5], [2]], np.float32), np.array([[200], [4]], np.uint8), scheme)
    assert dequantize(blocks).ravel().tolist() == [-100, *[27.5] * 15, -2]


def test_any_float_type_is_read_as_float32() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        matrix = as_matrix(np.array([[0.5, -2]], dtype), "w")
        assert matrix.dtype == np.float32
        assert matrix.tolist() == [[0.5, -2]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused_and_named(value: float) -> None:
    weight = np.zeros((5, 3))
    weight[3, 1] = weight[4, 2] = value
    said = "nan" if np.isnan(value) else "-inf" if value < 0 else "inf"
    message = f"weight encoder.fc1: expected finite numbers, got 2 that are not, the first ({said}) at [3,1]"
    with pytest.raises(SourceError, match=re.escape(message)):
        as_matrix(weight, "encoder.fc1")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        SourceError, match=re.escape(f"weight w: expected a matrix [K,N] to quantize, got shape {list(shape)}")
    ):
        as_matrix(np.zeros(shape, np.float32), "w")
