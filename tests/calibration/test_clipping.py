"""Narrowed ranges: by hand, never worse than the whole range, and as good as a scale of either sign."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.made import SCHEMES, correlated, matrices, normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.clipping import clip
from txopt.calibration.moments import output_errors, second_moments
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.errors import InputError


def squares(blocks: Blocks, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.square(dequantize(blocks).astype(np.float64) - weight).sum(axis=0)


def test_the_largest_value_lies_on_the_code_of_minus_8_where_that_is_exact() -> None:
    """15/16 of amax 8 over 7.5 is a scale of 1, on which all of these lie."""
    weight = np.array([[-8], [7], [3], [-1]], np.float32)
    blocks = clip(weight, BlockScheme(bits=4, block=16))
    assert blocks.scales.tolist() == [[1]]
    assert blocks.codes.ravel().tolist() == [-8, 7, 3, -1]


@given(matrices(), st.sampled_from(SCHEMES))
def test_no_column_is_worse_than_with_its_whole_range(weight: NDArray[np.float32], scheme: BlockScheme) -> None:
    whole = squares(round_to_nearest(weight, scheme), weight)
    assert (squares(clip(weight, scheme), weight) <= whole * (1 + 1e-5)).all()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_positive_scales_are_nearly_as_good_as_scales_of_either_sign(block: int) -> None:
    """The value of largest magnitude on -8: what ONNX Runtime's quantizer does, and TensorRT does not take."""
    weight = normal(1024, 64)
    rows = weight.reshape(-1, block, 64)
    extreme = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    scales = extreme / -8
    signed = np.square(np.clip(np.rint(rows / scales), -8, 7) * scales - rows).sum()
    ours = squares(clip(weight, BlockScheme(bits=4, block=block)), weight).sum()
    assert ours < 1.03 * signed
    assert ours < 0.9 * squares(round_to_nearest(weight, BlockScheme(bits=4, block=block)), weight).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_moments_of_the_inputs_lower_the_output_s_error_on_other_rows(symmetric: bool) -> None:
    scheme = BlockScheme(bits=4, block=32, symmetric=symmetric)
    weight, rows = normal(96, 48), correlated(4000, 96)
    seen, unseen = second_moments(rows[:2000]), second_moments(rows[2000:])
    blind, informed = clip(weight, scheme), clip(weight, scheme, moments=seen)
    errors = [output_errors(dequantize(each) - weight, unseen).sum() for each in (blind, informed)]
    assert errors[1] < 0.9 * errors[0]


def test_a_value_whose_input_was_never_seen_is_not_given_away() -> None:
    weight = np.array([[10], *[[0.1]] * 8, [-0.3], [0.7], [1.1], [-0.9], [0.2], [-1.3], [0.4]], np.float32)
    scheme = BlockScheme(bits=8, block=16)
    moments = np.diag([0.0, *[1.0] * 15])
    assert np.abs(dequantize(clip(weight, scheme, moments=moments)) - weight).max() < 0.1


def test_moments_of_another_weight_are_refused() -> None:
    with pytest.raises(InputError, match=r"weight fc1: expected second moments \[8,8\] of its inputs, got \[7, 7\]"):
        clip(normal(8, 2), BlockScheme(), moments=np.eye(7), name="fc1")
