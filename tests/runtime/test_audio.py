"""Sound to features as transformers computes them, and every sound that is refused."""

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from txopt.runtime.audio import AudioFrontend, decoder_prompt, read_audio
from txopt.runtime.errors import InputError, MissingDependencyError
from txopt.runtime.mel import filter_bank
from txopt.runtime.resample import resample

CLIP = Path(__file__).parents[1] / "data/speech/sense_and_sensibility_01_austen_64kb-0880.wav"
FRONTEND: dict[str, Any] = {
    "type": "audio",
    "feature_size": 80,
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "padding_value": 0.0,
}


def reference(samples: np.ndarray, mels: int) -> np.ndarray:
    """transformers' features in float64; its PyTorch path is float32 and strays from them by 2e-5."""
    padded = np.pad(samples, (0, 480_000 - samples.size)).astype(np.float32)
    return WhisperFeatureExtractor(feature_size=mels)._np_extract_fbank_features(padded[None], "cpu")


def resampled(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """The textbook's way: zeros between the samples, one long filter, every down-th sample of the result."""
    divisor = math.gcd(rate, target)
    up, down = target // divisor, rate // divisor
    widest = max(up, down)
    half = 10 * widest
    taps = np.kaiser(2 * half + 1, 5.0) * np.sinc(np.arange(-half, half + 1) / widest)
    stuffed = np.zeros(samples.size * up)
    stuffed[::up] = samples
    return np.convolve(stuffed, taps * up / taps.sum())[half : half + stuffed.size : down]


def tone(rate: int, seconds: float, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_features_of_speech_are_transformers(mels: int) -> None:
    features = AudioFrontend({**FRONTEND, "feature_size": mels}).encode([CLIP])["input_features"]
    assert features.dtype == np.float32
    assert features.shape == (1, mels, 3000)
    samples, _ = soundfile.read(CLIP, dtype="float32")
    np.testing.assert_allclose(features, reference(samples, mels), rtol=0, atol=1e-6)
    torch_path = WhisperFeatureExtractor(feature_size=mels)(samples, sampling_rate=16000, return_tensors="np")
    np.testing.assert_allclose(features, torch_path["input_features"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("count", [1, 159, 160, 161, 16_000, 479_599, 479_600, 479_601, 479_999, 480_000])
def test_features_at_every_boundary_of_the_window(count: int) -> None:
    samples = np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32)
    features = AudioFrontend(FRONTEND).features(samples)
    np.testing.assert_allclose(features, reference(samples, 80), rtol=0, atol=1e-6)


def test_silence_and_another_padding_value() -> None:
    frontend = AudioFrontend({**FRONTEND, "padding_value": 0.25})
    samples = np.zeros(1600, np.float32)
    np.testing.assert_allclose(AudioFrontend(FRONTEND).features(samples), reference(samples, 80), rtol=0, atol=1e-6)
    padded = np.full(480_000, 0.25, np.float32)
    padded[:1600] = 0
    np.testing.assert_allclose(frontend.features(samples), reference(padded, 80), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mels", [80, 128])
def test_filter_bank_is_slaneys(mels: int) -> None:
    expected = WhisperFeatureExtractor(feature_size=mels).mel_filters
    np.testing.assert_allclose(filter_bank(mels, 400, 16000), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("count", [1, 2, 100, 5003])
def test_resampling_is_scipys(rate: int, count: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    samples = np.random.default_rng(rate).normal(0, 0.2, count).astype(np.float32)
    expected = signal.resample_poly(samples.astype(np.float64), 16000, rate)
    result = resample(samples, rate, 16000)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize(("rate", "target"), [(8000, 16000), (16000, 16000), (48000, 16000), (44100, 16000), (7, 3)])
def test_resampling_is_the_textbooks(rate: int, target: int, count: int) -> None:
    samples = np.random.default_rng(0).normal(0, 0.2, count).astype(np.float32)
    expected = resampled(samples, rate, target)
    assert expected.size == math.ceil(count * target / rate)
    np.testing.assert_allclose(resample(samples, rate, target), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_24"), ("wav", "PCM_U8")]
)
def test_formats_rates_and_channels(tmp_path: Path, suffix: str, subtype: str) -> None:
    """A tone survives: any rate becomes 16 kHz, channels are averaged."""
    path = tmp_path / f"tone.{suffix}"
    left, right = tone(44100, 0.5), tone(44100, 0.5) / 2
    soundfile.write(path, np.stack([left, right], axis=1), 44100, subtype=subtype)
    samples = read_audio(path, 16000)
    assert samples.dtype == np.float32
    assert samples.shape == (8000,)
    np.testing.assert_allclose(samples[500:-500], tone(16000, 0.5)[500:-500] * 0.75, atol=8e-3)


def test_open_files_and_arrays_are_heard_alike() -> None:
    frontend = AudioFrontend(FRONTEND)
    samples, _ = soundfile.read(CLIP)
    from_bytes, from_array = frontend.encode([io.BytesIO(CLIP.read_bytes()), samples])["input_features"]
    np.testing.assert_array_equal(from_bytes, from_array)
    np.testing.assert_array_equal(from_bytes, frontend.encode([str(CLIP)])["input_features"][0])


def test_a_window_of_a_file_and_of_an_array(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 40 * 16000).astype(np.float32)
    path = tmp_path / "long.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    frontend = AudioFrontend(FRONTEND)
    expected = frontend.features(samples[32 * 16000 : 35 * 16000])
    for source in (path, samples):
        np.testing.assert_array_equal(frontend.encode([source], window=(32.0, 35.0))["input_features"], expected)
    clipped = frontend.encode([samples], window=(39.0, 60.0))["input_features"]
    np.testing.assert_array_equal(clipped, frontend.features(samples[39 * 16000 :]))


def test_thirty_seconds_fit_whatever_the_rate(tmp_path: Path) -> None:
    """30 s at 22050 Hz is resampled to exactly 30 s, and rounding up never leaves the window."""
    path = tmp_path / "whole.wav"
    soundfile.write(path, tone(22050, 30.0), 22050)
    assert AudioFrontend(FRONTEND).encode([path])["input_features"].shape == (1, 80, 3000)


def test_longer_sound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(31 * 8000, np.float32), 8000)
    with pytest.raises(InputError, match=r"31\.00 s of sound, the model hears 30 s .* window="):
        AudioFrontend(FRONTEND).encode([path])
    with pytest.raises(InputError, match=r"30\.00 s of sound"):
        AudioFrontend(FRONTEND).features(np.zeros(480_001, np.float32))


@pytest.mark.parametrize("window", [(-1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (100.0, 101.0), (float("nan"), 1.0)])
def test_windows_outside_the_sound_are_refused(window: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="expected 0 <= start < end"):
        AudioFrontend(FRONTEND).encode([CLIP], window=window)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is text, not sound", "expected sound .* found something else"),
        (b"", "expected sound"),
        (CLIP.read_bytes()[:20], "expected sound"),
        (CLIP.read_bytes()[:44], "without samples"),
    ],
)
def test_files_that_are_not_sound(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_audio(path, 16000)


def test_missing_files_folders_and_empty_sound(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_audio(tmp_path / "none.wav", 16000)
    with pytest.raises(InputError, match="found a folder"):
        read_audio(tmp_path, 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(InputError, match="without samples"):
        read_audio(tmp_path / "empty.wav", 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="NaN"):
        read_audio(tmp_path / "nan.wav", 16000)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100, np.float32), 10)
    with pytest.raises(InputError, match="expected 1000 to 768000 samples a second, found 10"):
        read_audio(tmp_path / "slow.wav", 16000)


@pytest.mark.parametrize(
    "samples",
    [np.zeros((2, 100), np.float32), np.zeros(100, np.int16), np.zeros(0, np.float32), np.full(10, np.inf)],
    ids=["stereo", "integers", "empty", "infinite"],
)
def test_arrays_that_are_not_samples(samples: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"sound 0: expected"):
        AudioFrontend(FRONTEND).encode([samples])


def test_no_sound_at_all() -> None:
    with pytest.raises(InputError, match="at least one"):
        AudioFrontend(FRONTEND).encode([])


def test_without_soundfile_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "txopt\[audio\]"'):
        read_audio(CLIP, 16000)


ENGLISH = {"multilingual": False, "no_timestamps_token_id": 50362}
MULTILINGUAL = {
    "multilingual": True,
    "lang_to_id": {"<|en|>": 50259, "<|de|>": 50261},
    "language_names": {"english": "en", "german": "de"},
    "task_to_id": {"translate": 50358, "transcribe": 50359},
    "no_timestamps_token_id": 50363,
}


def test_prompt_of_an_english_model() -> None:
    start = {"decoder_start_token_id": 50257}
    assert decoder_prompt(ENGLISH, start) == [50257, 50362]
    assert decoder_prompt(ENGLISH, start, language="en", task="transcribe") == [50257, 50362]
    assert decoder_prompt(ENGLISH, start, timestamps=True) == [50257]
    with pytest.raises(InputError, match="transcribes English and nothing else"):
        decoder_prompt(ENGLISH, start, language="de")
    with pytest.raises(InputError, match="transcribes English and nothing else"):
        decoder_prompt(ENGLISH, start, task="translate")


@pytest.mark.parametrize("language", ["de", "DE", "german", "German", "<|de|>"])
def test_prompt_of_a_multilingual_model(language: str) -> None:
    start = {"decoder_start_token_id": 50258}
    assert decoder_prompt(MULTILINGUAL, start, language=language) == [50258, 50261, 50359, 50363]
    assert decoder_prompt(MULTILINGUAL, start, language=language, task="translate") == [50258, 50261, 50358, 50363]
    assert decoder_prompt(MULTILINGUAL, start | {"language": language}, timestamps=True) == [50258, 50261, 50359]


def test_prompts_that_cannot_be() -> None:
    start = {"decoder_start_token_id": 50258}
    with pytest.raises(InputError, match="expected a language, found none; say which is spoken: de, en"):
        decoder_prompt(MULTILINGUAL, start)
    with pytest.raises(InputError, match="language='klingon': expected one of de, en"):
        decoder_prompt(MULTILINGUAL, start, language="klingon")
    with pytest.raises(InputError, match="task='sing': expected transcribe or translate"):
        decoder_prompt(MULTILINGUAL, start, language="de", task="sing")
    for generation, about in (({"language": 5}, "language=5"), ({"language": "de", "task": ["sing"]}, "task=")):
        with pytest.raises(InputError, match=f"{about}.*: expected text"):
            decoder_prompt(MULTILINGUAL, start | generation)
    for nothing in ({}, {"decoder_start_token_id": "50258"}):
        with pytest.raises(
            InputError, match="decoder_start_token_id: expected the id that this model starts from, found"
        ):
            decoder_prompt(MULTILINGUAL, nothing)
