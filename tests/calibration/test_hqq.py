"""HQQ: by hand, never worse than rounding to nearest, and against the implementation in ONNX Runtime."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

from tests.calibration.made import SCHEMES, matrices
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.grid import short
from txopt.calibration.hqq import hqq
from txopt.calibration.rounding import round_to_nearest


def heavy_tailed(*shape: int) -> NDArray[np.float32]:
    return (0.02 * np.random.default_rng(0).standard_t(4, shape)).astype(np.float32)


def absolute(blocks: Blocks, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The sum of |w - q| of each block and column [ceil(K/b),N]."""
    errors = np.abs(dequantize(blocks).astype(np.float64) - weight)
    return np.stack([errors[span].sum(axis=0) for span in blocks.scheme.spans(len(weight))])


def test_one_turn_by_hand() -> None:
    """Codes 7 -8 4 of 15 -15 7 with scale 2 fit best with 15 * 7 + 15 * 8 + 7 * 4 over 49 + 64 + 16, and stay what they are."""
    blocks = hqq(np.array([[15], [-15], [7]], np.float32), BlockScheme(bits=4, block=16))
    assert blocks.codes.ravel().tolist() == [7, -8, 4]
    assert blocks.scales.tolist() == [[float(short(np.float32(253 / 129)))]]


@given(matrices(), st.sampled_from(SCHEMES))
def test_no_block_is_worse_than_rounded_to_nearest(weight: NDArray[np.float32], scheme: BlockScheme) -> None:
    nearest = absolute(round_to_nearest(weight, scheme), weight)
    assert (absolute(hqq(weight, scheme), weight) <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_gain(block: int, symmetric: bool) -> None:
    scheme = BlockScheme(bits=4, block=block, symmetric=symmetric)
    weight = heavy_tailed(512, 48)
    nearest, fitted = round_to_nearest(weight, scheme), hqq(weight, scheme)
    assert absolute(fitted, weight).sum() < 0.97 * absolute(nearest, weight).sum()
    assert np.square(dequantize(fitted) - weight).sum() < 0.97 * np.square(dequantize(nearest) - weight).sum()


def test_outliers_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In large blocks, whose few large values would keep the steps wide; no error counts as an outlier where beta is next to 0."""
    scheme = BlockScheme(bits=4, block=256)
    weight = heavy_tailed(1024, 48)
    aside = absolute(hqq(weight, scheme), weight).sum()
    monkeypatch.setattr("txopt.calibration.hqq._BETA", 1e-9)
    assert aside < 0.97 * absolute(hqq(weight, scheme), weight).sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_and_its_double_have_the_same_codes(scheme: BlockScheme) -> None:
    weight = heavy_tailed(100, 8)
    once, twice = hqq(weight, scheme), hqq(2 * weight, scheme)
    assert (once.codes == twice.codes).all()
    assert (twice.scales == 2 * once.scales).all()


def test_whole_zero_points_with_fitted_scales_are_no_worse_than_the_published_real_ones() -> None:
    weight = heavy_tailed(512, 48)
    config = HQQWeightOnlyQuantConfig(block_size=64, bits=4)
    codes, scales, zeros = HQQWeightOnlyQuantizer(config).quantize_internal(
        torch.from_numpy(weight.T.copy()), 4, group_size=64
    )
    published = ((codes.reshape(48, 8, 64) - zeros[..., None]) * scales[..., None]).reshape(48, 512).numpy().T
    ours = dequantize(hqq(weight, BlockScheme(bits=4, block=64, symmetric=False)))
    assert np.abs(ours - weight).sum() < 1.02 * np.abs(published - weight).sum()
