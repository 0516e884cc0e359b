"""Sampling-rate conversion in numpy: a polyphase filter bank over a Kaiser-windowed sinc.

It knows samples and rates, nothing of files. The filter is the one scipy.signal.resample_poly designs by default
(Kaiser 5.0, ten zero crossings a side), so both give the same samples.
"""

import math

import numpy as np
from numpy.typing import NDArray

_KAISER_BETA = 5.0
_ZERO_CROSSINGS = 10


def resample(samples: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    """``samples`` [N] at ``source`` Hz as float32 [ceil(N * target / source)] at ``target`` Hz.

    Output sample n is the sum over k of taps[k] * x[(n * down + half - k) / up], where only every up-th tap meets an
    input sample: outputs that share n * down modulo up share their taps, and are computed together.
    """
    divisor = math.gcd(source, target)
    up, down = target // divisor, source // divisor
    if up == down:
        return samples.astype(np.float32, copy=False)
    taps, half = _low_pass(up, down)
    reach = -(-taps.size // up)  # input samples that one output sees
    banks = np.zeros((reach, up))
    banks.reshape(-1)[: taps.size] = taps
    banks = banks[::-1].T  # [up, reach], oldest input first
    count = -(-samples.size * up // down)
    result = np.empty(count, np.float32)
    # Output n sees the inputs up to position (n * down + half) // up; `before` zeros precede them, enough follow.
    last = ((count - 1) * down + half) // up
    padded = np.concatenate([np.zeros(reach - 1), samples, np.zeros(max(0, last + 1 - samples.size))])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach)
    for first in range(min(up, count)):
        newest, phase = divmod(first * down + half, up)
        outputs = -(-(count - first) // up)
        result[first::up] = windows[newest::down][:outputs] @ banks[phase]
    return result


def _low_pass(up: int, down: int) -> tuple[NDArray[np.float64], int]:
    """Taps [2 * half + 1] of the filter at the rate ``up`` times the source's, and half; the gain is ``up``."""
    widest = max(up, down)
    half = _ZERO_CROSSINGS * widest
    taps = np.sinc(np.arange(-half, half + 1) / widest) * np.kaiser(2 * half + 1, _KAISER_BETA)
    return taps * (up / taps.sum()), half
