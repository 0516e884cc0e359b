"""Sounds as samples: what transformers' feature extractor makes of them, and every sound that is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import SpeechT5FeatureExtractor

from txopt.runtime.errors import InputError
from txopt.runtime.waveform import WaveformFrontend

CLIP = Path(__file__).parents[1] / "data/speech/sense_and_sensibility_01_austen_64kb-0880.wav"
FRONTEND: dict[str, Any] = {"type": "waveform", "sampling_rate": 16000, "least_samples": 400, "most_samples": 480_000}


def sounds() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.normal(0.1, 0.2, size).astype(np.float32) for size in (900, 400, 1601)]


@pytest.mark.parametrize("do_normalize", [False, True])
@pytest.mark.parametrize("padding_value", [0.0, -1.0])
def test_samples_are_those_of_transformers(do_normalize: bool, padding_value: float) -> None:
    settings = {"do_normalize": do_normalize, "padding_value": padding_value}
    found = WaveformFrontend({**FRONTEND, **settings}).encode(sounds())
    # do_normalize of transformers' own pad() needs the mask, which it gives where it pads.
    expected = SpeechT5FeatureExtractor(**settings)(sounds(), sampling_rate=16000, padding=True, return_tensors="np")
    np.testing.assert_allclose(found["input_values"], expected["input_values"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["attention_mask"], expected["attention_mask"])
    assert found["input_values"].dtype == np.float32
    assert found["attention_mask"].dtype == np.int64


def test_a_file_is_read_at_the_models_rate_and_a_window_of_it() -> None:
    whole = WaveformFrontend(FRONTEND).encode([CLIP])["input_values"]
    part = WaveformFrontend(FRONTEND).encode([CLIP], window=(0.5, 1.5))["input_values"]
    np.testing.assert_array_equal(part, whole[:, 8000:24000])
    assert WaveformFrontend({**FRONTEND, "sampling_rate": 8000}).encode([CLIP])["input_values"].shape[
        1
    ] == pytest.approx(whole.shape[1] / 2, abs=1)


def test_sounds_too_short_to_make_a_frame_are_all_named() -> None:
    with pytest.raises(InputError, match=r"at least 400 samples.*\n.*sound 0: 399.*\n.*sound 2: 7") as caught:
        WaveformFrontend(FRONTEND).encode([np.zeros(n, np.float32) for n in (399, 400, 7)])
    assert "sound 1" not in str(caught.value)


def test_what_the_model_cannot_hear_at_once_is_refused() -> None:
    with pytest.raises(InputError, match="30"):
        WaveformFrontend(FRONTEND).encode([np.zeros(480_001, np.float32)])
    assert WaveformFrontend({**FRONTEND, "most_samples": None}).encode([np.zeros(480_001, np.float32)])


def test_no_sound_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least one sound"):
        WaveformFrontend(FRONTEND).encode([])
