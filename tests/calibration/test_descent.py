"""Coordinate descent: one turn by hand, never worse than what it starts from, and better on inputs that were not calibrated on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.made import SCHEMES, correlated, matrices, normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.descent import DAMPING, descend, descended
from txopt.calibration.gptq import gptq
from txopt.calibration.grid import short
from txopt.calibration.moments import damped, output_errors, second_moments
from txopt.runtime.errors import InputError, SourceError

FOUR = BlockScheme(bits=4, block=16)
UNSIGNED = BlockScheme(bits=4, block=32, symmetric=False)


def loss(blocks: Blocks, weight: NDArray[np.float32], moments: NDArray[np.float64]) -> NDArray[np.float32]:
    return output_errors(dequantize(blocks) - weight, moments)


def blocks_of(codes: list[int], scale: float = 1) -> Blocks:
    return Blocks(np.array(codes, np.int8)[:, None], np.array([[scale]], np.float32), None, FOUR)


def test_a_row_makes_up_for_the_rows_behind_it_too() -> None:
    """With H = [[1, 1/2], [1/2, 1]], 0.4 and 0.4 both rounded to 0 are off by -0.4: the first row is best at 0.4 + 0.2, code 1, off by
    0.6; then the second is best at 0.4 - 0.3 = 0.1, code 0. The error is 0.36 + 0.16 - 0.24 = 0.28 instead of 0.48."""
    weight, hessian = np.full((2, 1), 0.4, np.float32), np.array([[1, 0.5], [0.5, 1]], np.float32)
    blocks = descend(blocks_of([0, 0]), weight, hessian, turns=1)
    assert blocks.codes.ravel().tolist() == [1, 0]
    assert blocks.scales.tolist() == [[1]]  # of a block of zeros
    assert loss(blocks, weight, hessian.astype(np.float64)) == pytest.approx(0.28)


def test_a_scale_fits_its_codes_best() -> None:
    """With H = 1, codes 7 -8 4 of 15 -15 7: 15 * 7 + 15 * 8 + 7 * 4 over 49 + 64 + 16; they stay the nearest."""
    weight = np.array([[15], [-15], [7]], np.float32)
    blocks = descend(blocks_of([7, -8, 4], 2), weight, np.eye(3, dtype=np.float32), turns=1)
    assert blocks.codes.ravel().tolist() == [7, -8, 4]
    assert blocks.scales.tolist() == [[float(short(np.float32(253 / 129)))]]


def test_a_scale_makes_up_for_other_blocks() -> None:
    """Two blocks read one input: 16 rows of 0 in the first that should be 1/16 are 1 together, which the second, 4 of 3, adds."""
    weight = np.concatenate([np.full((16, 1), 1 / 16), [[4.0]]]).astype(np.float32)
    start = Blocks(np.array([*[0] * 16, 4], np.int8)[:, None], np.ones((2, 1), np.float32), None, FOUR)
    hessian = np.ones((17, 17), np.float32) + np.eye(17, dtype=np.float32) / 1e4
    blocks = descend(start, weight, hessian, turns=0)
    assert (blocks.scales == 1).all()
    fitted = descend(start, weight, hessian, turns=1)
    assert fitted.scales[1, 0] == pytest.approx(5 / 4, rel=2e-3)


@given(matrices(rows=40), st.sampled_from(SCHEMES), st.integers(0, 9))
def test_no_column_is_worse_than_after_gptq(weight: NDArray[np.float32], scheme: BlockScheme, seed: int) -> None:
    moments = second_moments(correlated(30, len(weight), seed))
    hessian = damped(moments, DAMPING)
    before = loss(gptq(weight, hessian, scheme), weight, hessian)
    assert (loss(descended(weight, moments, scheme), weight, hessian) <= before * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_gains_on_rows_that_were_not_calibrated_on(bits: int, symmetric: bool) -> None:
    scheme = BlockScheme(bits=bits, block=32, symmetric=symmetric)
    weight, rows = normal(160, 48), correlated(4000, 160)
    seen, unseen = second_moments(rows[:2000]), second_moments(rows[2000:])
    assert (
        loss(descended(weight, seen, scheme), weight, unseen).sum()
        < 0.95 * loss(gptq(weight, seen, scheme), weight, unseen).sum()
    )


def test_columns_do_not_depend_on_each_other() -> None:
    """They are taken in parts, of which the last is small."""
    weight, moments = normal(40, 1030), second_moments(correlated(500, 40))
    whole, some = descended(weight, moments, UNSIGNED), descended(weight[:, 1020:], moments, UNSIGNED)
    assert (whole.codes[:, 1020:] == some.codes).mean() > 0.99  # products of other shapes are summed in another order
    assert np.allclose(loss(whole, weight, moments)[1020:], loss(some, weight[:, 1020:], moments), rtol=0.05)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros((5, 40)), id="nothing seen"),
        pytest.param(normal(3, 40), id="fewer rows than inputs"),
        pytest.param(np.repeat(normal(50, 1), 40, axis=1), id="inputs all equal"),
        pytest.param(normal(50, 40) * 10.0 ** np.arange(-20, 20), id="inputs of forty magnitudes"),
        pytest.param(normal(50, 40) * 1e-30, id="inputs next to nothing"),
    ],
)
def test_moments_that_have_no_inverse_do_no_harm(rows: NDArray[np.floating]) -> None:
    weight, moments = normal(40, 6), second_moments(rows)
    hessian = damped(moments, DAMPING)
    hessian /= np.diag(hessian).mean()
    before = loss(gptq(weight, hessian, UNSIGNED), weight, hessian)
    assert (loss(descended(weight, moments, UNSIGNED), weight, hessian) <= before * (1 + 1e-3)).all()


def test_what_cannot_be_rounded_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"weight fc1: expected finite numbers"):
        descended(np.array([[np.nan]]), np.eye(1), FOUR, name="fc1")
    with pytest.raises(InputError, match=r"weight fc1: expected second moments \[4,4\]"):
        descended(normal(4, 2), np.eye(3), FOUR, name="fc1")
