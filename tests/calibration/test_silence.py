"""The silence behind a sound: what of an encoder's places calibration sees."""

import numpy as np
import pytest
from numpy.typing import NDArray

from txopt.calibration.silence import counted


def features(heard: int, frames: int = 96) -> NDArray[np.float32]:
    """[1,2,frames]: noise, then one frame again and again."""
    made = np.random.default_rng(0).standard_normal((1, 2, frames)).astype(np.float32)
    made[:, :, heard:] = -1.5
    return made


@pytest.mark.parametrize(
    ("heard", "seen"),
    [
        pytest.param(20, [*range(10), 16, 32], id="two frames a place"),
        pytest.param(21, [*range(11), 16, 32], id="half a place counts"),
        pytest.param(0, [0, 16, 32], id="silence alone"),
        pytest.param(96, list(range(48)), id="no tail"),
    ],
)
def test_places_up_to_the_tail_count_and_one_of_sixteen_behind(heard: int, seen: list[int]) -> None:
    assert np.flatnonzero(counted(features(heard), 48)[0]).tolist() == seen


def test_rows_have_tails_of_their_own() -> None:
    both = np.concatenate([features(8), features(64)])
    assert counted(both, 48).sum(axis=1).tolist() == [4 + 2, 32 + 1]


def test_silence_in_the_middle_counts() -> None:
    made = features(40)
    made[:, :, 10:20] = -1.5
    assert counted(made, 48)[0, :20].all()
