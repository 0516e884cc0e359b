"""SmoothQuant's factors by hand, and that the ones that are searched do lose less."""

import numpy as np
import pytest

from tests.calibration.made import normal
from txopt.calibration.channels import per_channel
from txopt.calibration.smooth import factors, searched


def test_factors_are_equation_4_with_a_geometric_mean_of_one() -> None:
    weight = np.array([[1, -2], [0.5, 0.25]], np.float32)
    got = factors(weight, np.array([8.0, 0.5]), 0.5)
    raw = np.array([np.sqrt(8) / np.sqrt(2), np.sqrt(0.5) / np.sqrt(0.5)])
    assert np.allclose(got, raw / np.sqrt(raw.prod()), rtol=1e-6)
    assert np.isclose(got.prod(), 1)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_says_which_side_is_flat(alpha: float) -> None:
    weight, sizes = normal(8, 4), np.exp(normal(8, seed=1))
    got = factors(weight, sizes, alpha)
    flat = sizes / got if alpha == 1 else np.abs(weight).max(axis=1) * got
    assert np.allclose(flat, flat[0], rtol=1e-5)


def test_channels_that_were_never_seen_get_finite_factors() -> None:
    got = factors(np.zeros((4, 2), np.float32), np.array([0, 1, 0, 2.0]), 0.5)
    assert np.isfinite(got).all()
    assert (factors(np.zeros((4, 2), np.float32), np.zeros(4), 0.5) == 1).all()


def test_an_outlier_channel_is_searched_and_loses_less() -> None:
    rows, weight = normal(200, 64, seed=2), normal(64, 32, seed=3)
    rows[:, 5] *= 60
    sizes = np.abs(rows).max(axis=0)
    chosen = searched(weight, rows, sizes)
    assert chosen is not None

    def error(scale: np.ndarray) -> float:
        step = (sizes / scale).max() / 127
        rounded = np.rint(rows / scale / step).clip(-127, 127) * step
        return float(np.square(rounded @ per_channel(weight * scale[:, None]).dequantize() - rows @ weight).sum())

    assert error(chosen) < 0.1 * error(np.ones(64))


def test_what_cannot_be_bettered_is_left_alone() -> None:
    """Every channel alike, codes that are exact: nothing is gained."""
    weight = np.tile(np.array([[127.0, -64.0]], np.float32), (8, 1))
    rows = np.full((4, 8), 127, np.float32)
    assert searched(weight, rows, np.full(8, 127.0)) is None
