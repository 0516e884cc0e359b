"""GPTQ: by hand, never worse than rounding to nearest, inputs that make it hard, and the paper's equation."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.made import SCHEMES, correlated, matrices, normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.gptq import gptq
from txopt.calibration.grid import Grid, covering, decode, encode
from txopt.calibration.moments import output_errors, second_moments
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.errors import InputError, SourceError

FOUR = BlockScheme(bits=4, block=16)


def step_of_one(rows: NDArray[np.float32], _: slice) -> Grid:
    return Grid(np.ones(rows.shape[1], np.float32), None)


def loss(blocks: Blocks, weight: NDArray[np.float32], moments: NDArray[np.float64]) -> NDArray[np.float32]:
    return output_errors(dequantize(blocks) - weight, moments)


def test_the_second_row_makes_up_for_the_first() -> None:
    """Damped, H is [[2.02, 1], [1, 2.02]]: 0.4 becomes 0, and of the rest 0.4 / 2.02 goes to the second row: 0.598 becomes 1."""
    moments = np.array([[2, 1], [1, 2]])
    blocks = gptq(np.array([[0.4, 0.2], [0.4, 0.2]]), moments, FOUR, choose=step_of_one)
    assert blocks.codes.tolist() == [[0, 0], [1, 0]]


def test_an_error_goes_on_to_all_rows_behind() -> None:
    """H = all ones, damped by 0.01: three rows that are nearly one input share an error; of 0.4 each, their sum 1.2 becomes 1."""
    blocks = gptq(np.full((3, 1), 0.4), np.ones((3, 3)), FOUR, choose=step_of_one)
    assert blocks.codes.ravel().tolist() == [0, 1, 0]


def test_the_next_block_s_grid_is_that_of_rows_made_up_for() -> None:
    """The one row of the second block is moved before its scale is chosen, so that it is half a step off, as any amax is."""
    moments = second_moments(correlated(500, 17))
    weight = normal(17, 5)
    seen = []

    def note(rows: NDArray[np.float32], span: slice) -> Grid:
        seen.append((span, rows.copy()))
        return covering(rows, FOUR)

    gptq(weight, moments, FOUR, choose=note)
    assert [span for span, _ in seen[:2]] == [slice(0, 16), slice(16, 17)]  # then those of rounding to nearest
    assert (seen[0][1] == weight[:16]).all()
    assert (np.abs(seen[1][1] - weight[16:]) > 1e-3).all()


@given(matrices(rows=40), st.sampled_from(SCHEMES), st.integers(0, 9))
def test_no_column_is_worse_than_rounded_to_nearest(
    weight: NDArray[np.float32], scheme: BlockScheme, seed: int
) -> None:
    moments = second_moments(correlated(30, len(weight), seed))
    nearest = loss(round_to_nearest(weight, scheme), weight, moments)
    assert (loss(gptq(weight, moments, scheme), weight, moments) <= nearest * (1 + 1e-4)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_gains_on_rows_that_were_not_calibrated_on(scheme: BlockScheme) -> None:
    weight, rows = normal(160, 48), correlated(4000, 160)
    seen, unseen = second_moments(rows[:2000]), second_moments(rows[2000:])
    nearest, blocks = round_to_nearest(weight, scheme), gptq(weight, seen, scheme)
    assert loss(blocks, weight, unseen).sum() < 0.6 * loss(nearest, weight, unseen).sum()


def by_the_book(weight: NDArray[np.float32], moments: NDArray[np.float64], scheme: BlockScheme) -> NDArray[np.float64]:
    """Frantar et al. 2022, equation 2, as it is written: after every row the inverse of what is left of H, no factorization."""
    left = weight.astype(np.float64)
    hessian = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    rounded = np.empty_like(left)
    for k in range(len(left)):
        if k % scheme.block == 0:
            grid = covering(left[k : k + scheme.block].astype(np.float32), scheme)
        rounded[k] = decode(encode(left[k].astype(np.float32), grid, scheme), grid)
        inverse = np.linalg.inv(hessian[k:, k:])
        left[k + 1 :] -= np.outer(inverse[1:, 0] / inverse[0, 0], left[k] - rounded[k])
    return rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 128])
def test_codes_are_those_of_the_paper_s_equation(symmetric: bool, block: int) -> None:
    scheme = BlockScheme(bits=4, block=block, symmetric=symmetric)
    weight, moments = normal(140, 16), second_moments(correlated(1000, 140))
    blocks = gptq(weight, moments, scheme, choose=lambda rows, _: covering(rows, scheme))
    book = by_the_book(weight, moments, scheme)
    assert np.isclose(dequantize(blocks), book, rtol=1e-4, atol=1e-4).mean() > 0.98  # float32 can tip a half


def test_weights_of_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    rows = correlated(500, 48)
    rows[:, [3, 20, 47]] = 0
    weight = normal(48, 6)
    blocks = gptq(weight, second_moments(rows), FOUR)
    scales = np.repeat(blocks.scales, 16, axis=0)
    unseen = [3, 20, 47]
    inside = np.abs(weight) < 7 * scales
    assert (np.abs(dequantize(blocks) - weight) <= scales * (0.5 + 1e-4))[unseen][inside[unseen]].all()
    assert np.abs(dequantize(blocks)[unseen]).max() > 0


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
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_moments_that_have_no_inverse_do_no_harm(rows: NDArray[np.floating], scheme: BlockScheme) -> None:
    weight = normal(40, 6)
    moments = second_moments(rows)
    blocks = gptq(weight, moments, scheme)
    nearest = loss(round_to_nearest(weight, scheme), weight, moments)
    assert (loss(blocks, weight, moments) <= nearest * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        (np.eye(3), "expected second moments [4,4] of its inputs, got [3, 3]"),
        (np.full((4, 4), np.nan), "expected finite second moments"),
        (-np.eye(4), "expected finite second moments of its inputs, got infinite or negative ones"),
        (1 - np.eye(4) * 0.5, "got a matrix that is not positive semidefinite"),
    ],
)
def test_what_are_no_second_moments_is_refused_and_named(moments: NDArray[np.float64], said: str) -> None:
    with pytest.raises(InputError) as error:
        gptq(normal(4, 2), moments, FOUR, name="decoder.fc2")
    assert "weight decoder.fc2" in str(error.value)
    assert said in str(error.value)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"weight fc1: expected finite numbers"):
        gptq(np.array([[np.nan]]), np.eye(1), FOUR, name="fc1")


def test_512_by_2048_takes_less_than_a_second() -> None:
    weight, moments = normal(512, 2048), second_moments(correlated(1024, 512))
    start = time.process_time()  # of all threads together, so that a busy machine does not count
    gptq(weight, moments, BlockScheme(bits=4, block=32))
    assert time.process_time() - start < 1
