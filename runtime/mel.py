"""Whisper's log-mel spectrogram in numpy.

Owns the arithmetic from samples to features. It knows nothing of files, rates or models: all sizes are arguments.
Equal to transformers' WhisperFeatureExtractor (its numpy path is followed in float64) to 1e-5.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Slaney's Auditory Toolbox: linear below 1000 Hz (200/3 Hz a mel), logarithmic above (27 mels for a factor of 6.4).
_LINEAR = 200.0 / 3.0
_CORNER_HERTZ = 1000.0
_CORNER_MEL = _CORNER_HERTZ / _LINEAR
_LOG_STEP = np.log(6.4) / 27.0
_FLOOR = 1e-10
_HIGHEST = 8000.0  # Whisper's bank ends here whatever the rate


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _CORNER_HERTZ:
        return hertz / _LINEAR
    return float(_CORNER_MEL + np.log(hertz / _CORNER_HERTZ) / _LOG_STEP)


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _CORNER_HERTZ * np.exp(_LOG_STEP * (np.maximum(mel, _CORNER_MEL) - _CORNER_MEL))
    return np.where(mel < _CORNER_MEL, mel * _LINEAR, above)


@lru_cache(maxsize=4)
def filter_bank(mels: int, n_fft: int, sampling_rate: int) -> NDArray[np.float64]:
    """Triangular filters, each of area one (Slaney): float64 [n_fft // 2 + 1, mels]."""
    bins = np.linspace(0.0, sampling_rate // 2, n_fft // 2 + 1)
    edges = _mel_to_hertz(np.linspace(0.0, _hertz_to_mel(_HIGHEST), mels + 2))
    slopes = edges[None, :] - bins[:, None]
    widths = np.diff(edges)
    filters = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    filters *= 2.0 / (edges[2:] - edges[:-2])
    filters.setflags(write=False)  # shared by every caller
    return filters


def log_mel(
    samples: NDArray[np.float32],
    *,
    length: int,
    mels: int,
    n_fft: int,
    hop_length: int,
    sampling_rate: int,
    padding_value: float,
) -> NDArray[np.float32]:
    """Features of one window.

    Args:
        samples: float32 [N] with N <= length; the rest of the window is ``padding_value``.
        length: samples of a whole window.

    Returns:
        float32 [mels, length // hop_length].
    """
    frames = length // hop_length
    half = n_fft // 2
    window = np.full(length, padding_value, np.float64)
    window[: samples.size] = samples
    padded = np.pad(window, half, mode="reflect")
    # Frames that see nothing but zeros are the floor: a short clip need not pay for thirty seconds.
    computed = frames
    if padding_value == 0.0 and samples.size <= length - n_fft:
        computed = min(frames, -(-(samples.size + half) // hop_length))
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(n_fft) / n_fft)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length][:computed]
    spectrum = np.fft.rfft(pieces * hann)
    power = spectrum.real**2 + spectrum.imag**2
    bank = filter_bank(mels, n_fft, sampling_rate)
    log = np.full((mels, frames), np.log10(_FLOOR), np.float32)
    log[:, :computed] = np.log10(np.maximum(power @ bank, _FLOOR)).T
    scaled: NDArray[np.float32] = (np.maximum(log, log.max() - np.float32(8.0)) + np.float32(4.0)) / np.float32(4.0)
    return scaled
