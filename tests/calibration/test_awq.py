"""AWQ's scales: what they are by hand, and that folding them in lowers the output's error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.graphs import engine, parsed
from tests.calibration.made import SCHEMES, correlated, matrices, normal
from txopt.calibration.awq import fold_scales, input_scales
from txopt.calibration.blocks import BlockScheme, dequantize
from txopt.calibration.clipping import clip
from txopt.calibration.moments import output_errors, second_moments
from txopt.calibration.rounding import round_to_nearest

FOUR = BlockScheme(bits=4, block=32)


def loss(
    weight: NDArray[np.float32], scales: NDArray[np.float32], moments: NDArray[np.float64], scheme: BlockScheme
) -> float:
    """The output's error where the input is divided by ``scales``."""
    column = scales[:, None]
    rounded = dequantize(round_to_nearest(weight * column, scheme)) / column
    return float(output_errors(rounded - weight, moments).sum())


def test_scales_are_a_power_of_the_root_mean_square_with_a_geometric_mean_of_1() -> None:
    magnitudes = np.exp(np.random.default_rng(0).standard_normal(64))
    scales = input_scales(normal(64, 32), np.diag(magnitudes**2), FOUR)
    alphas = np.log(scales) / (np.log(magnitudes) - np.log(magnitudes).mean())
    assert alphas == pytest.approx(alphas[0], rel=1e-3)
    assert alphas[0] == pytest.approx(round(20 * alphas[0]) / 20, rel=1e-3)
    assert 0.2 < alphas[0] < 0.9
    assert np.log(scales).mean() == pytest.approx(0, abs=1e-6)


def test_equal_inputs_have_no_scales() -> None:
    assert input_scales(normal(64, 8), 3 * np.eye(64), FOUR).tolist() == [1] * 64


def test_inputs_that_were_never_seen_have_a_scale_of_1() -> None:
    magnitudes = np.geomspace(1e-9, 10, 64)
    magnitudes[[5, 40]] = 0
    scales = input_scales(normal(64, 32), np.diag(magnitudes**2), FOUR)
    assert scales[[5, 40]].tolist() == [1, 1]
    assert scales.min() > 0
    assert scales.max() / scales.min() <= 1e4 * (1 + 1e-5)
    assert input_scales(normal(4, 3), np.zeros((4, 4)), FOUR).tolist() == [1] * 4


@given(matrices(rows=40), st.sampled_from(SCHEMES), st.integers(0, 9))
def test_scales_never_do_worse_than_none(weight: NDArray[np.float32], scheme: BlockScheme, seed: int) -> None:
    moments = second_moments(correlated(30, len(weight), seed))
    scales = input_scales(weight, moments, scheme)
    assert (scales > 0).all()
    assert loss(weight, scales, moments, scheme) <= loss(weight, np.ones_like(scales), moments, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_gain_on_rows_that_were_not_calibrated_on(scheme: BlockScheme) -> None:
    weight, rows = normal(128, 48), correlated(4000, 128)
    seen, unseen = second_moments(rows[:2000]), second_moments(rows[2000:])
    scales = input_scales(weight, seen, scheme)
    assert loss(weight, scales, unseen, scheme) < 0.9 * loss(weight, np.ones_like(scales), unseen, scheme)


def test_scales_and_clipping_together_gain_more_than_each() -> None:
    weight, moments = normal(128, 48), second_moments(correlated(2000, 128))
    scales = input_scales(weight, moments, FOUR)
    column = scales[:, None]
    both = dequantize(clip(weight * column, FOUR, moments=moments / np.outer(scales, scales))) / column
    error = output_errors(both - weight, moments).sum()
    clipped = output_errors(dequantize(clip(weight, FOUR, moments=moments)) - weight, moments).sum()
    assert error < min(clipped, loss(weight, scales, moments, FOUR))


def test_folded_scales_change_the_weights_and_not_what_is_said() -> None:
    text = """(float[B,64] x) => (float[B,96] y, float[B,64] z)
        { a = LayerNormalization(x, g, b)  h = MatMul(a, w)  y = MatMul(h, v)  z = MatMul(x, u) }"""
    spread = np.exp(np.random.default_rng(0).standard_normal(64)).astype(np.float32)
    weights = {"g": spread, "b": normal(64), "w": normal(64, 80), "v": normal(80, 96), "u": normal(64, 64)}
    model, x = parsed(text, **weights), normal(7, 64)
    before = engine(model, x=x)
    moments = {"a": np.diag(spread.astype(np.float64) ** 2), "h": np.eye(80), "x": np.eye(64)}
    seen = fold_scales(model.graph, moments, FOUR)
    for old, new in zip(before, engine(model, x=x), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())
    scales = input_scales(weights["w"], moments["a"], FOUR)
    changed = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    np.testing.assert_allclose(changed["w"], scales[:, None] * weights["w"], rtol=1e-5)
    np.testing.assert_allclose(changed["g"], weights["g"] / scales, rtol=1e-5)
    np.testing.assert_allclose(seen["a"], moments["a"] / np.outer(scales, scales), rtol=1e-5)
    assert (changed["u"] == weights["u"]).all()  # an input of the graph: nobody can divide it
