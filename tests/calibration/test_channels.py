"""int8 with a scale for each output channel: integers by hand, the bound, and TensorRT's conditions."""

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from tests.calibration.made import matrices
from txopt.calibration.channels import per_channel
from txopt.runtime.errors import SourceError


def test_codes_computed_by_hand() -> None:
    weight = np.array([[127, 0, -0.375], [-63.5, 0, 31.75], [0.5, 0, 0.125]], np.float32)
    quantized = per_channel(weight)
    assert quantized.codes.tolist() == [[127, 0, -2], [-64, 0, 127], [0, 0, 0]]
    assert quantized.scales.tolist() == [1, 1, 0.25]
    assert quantized.dequantize().tolist() == [[127, 0, -0.5], [-64, 0, 31.75], [0, 0, 0]]


@given(matrices())
def test_no_value_is_more_than_half_a_scale_off(weight: NDArray[np.float32]) -> None:
    quantized = per_channel(weight)
    assert (quantized.codes.dtype, quantized.scales.dtype) == (np.int8, np.float32)
    assert (quantized.scales > 0).all()
    assert np.abs(quantized.codes.astype(int)).max() <= 127
    assert (np.abs(quantized.dequantize().astype(float) - weight) <= quantized.scales * (0.5 + 1e-4)).all()


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"weight encoder\.fc1: expected finite numbers"):
        per_channel(np.array([[np.inf]]), name="encoder.fc1")
