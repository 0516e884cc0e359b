"""Sounds and images as calibration data: tables of files, arrays, and what is told of those that are damaged or missing."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.calibration.models import IMAGE, IMAGE_INPUTS, RATE, SOUND_INPUTS, WAVEFORM, model
from tests.runtime.artifacts import tensor
from tests.runtime.test_audio import FRONTEND as AUDIO
from txopt.calibration.data import read
from txopt.runtime.errors import InputError
from txopt.runtime.model import Model


def wav(path: Path, seconds: float, seed: int = 0) -> Path:
    samples = np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    soundfile.write(path, samples, RATE)
    return path


@pytest.fixture
def hears(tmp_path: Path) -> Model:
    return model(tmp_path, AUDIO, inputs=(tensor("input_features", "float32", "B", 80, 3000),))


def test_sounds_are_read_when_they_are_asked_for(hears: Model, tmp_path: Path) -> None:
    for number, seconds in enumerate((0.5, 1.0, 1.5, 0.5)):
        wav(tmp_path / f"{number}.wav", seconds, seed=number % 3)
    (tmp_path / "a.tsv").write_text("".join(f"{number}.wav\t\n" for number in range(4)))
    samples = read(tmp_path / "a.tsv", hears)
    assert samples.counts.seconds == 3.0  # the last is the first under another name
    assert samples.counts.duplicates == 1
    feeds = samples[0].feeds
    assert feeds.keys() == {"input_features"}
    expected = read([tmp_path / samples[0].source], hears)[0].feeds
    np.testing.assert_array_equal(feeds["input_features"], expected["input_features"])
    assert samples[0].prompt.tolist() == [0]
    (tmp_path / samples[0].source).unlink()
    with pytest.raises(InputError, match="no such file"):
        samples[0]


def test_a_data_set_that_moved_is_the_same_data(hears: Model, tmp_path: Path) -> None:
    for folder, names in (("one", "ab"), ("two", "dc")):
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(names):
            wav(tmp_path / folder / f"{name}.wav", 0.5, seed)
        (tmp_path / folder / "a.tsv").write_text("".join(f"{name}.wav\t{i}\n" for i, name in enumerate(names)))
    assert read(tmp_path / "one/a.tsv", hears).sha256 == read(tmp_path / "two/a.tsv", hears).sha256


def test_as_many_seconds_as_asked_for(hears: Model) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (40, RATE)).astype(np.float32)
    samples = read([row[: 400 * (n + 1)] for n, row in enumerate(noise)], hears, seconds=5.0)
    assert samples.counts.seconds is not None
    assert 2.5 < samples.counts.seconds <= 5.0
    assert samples.counts.found == 40


def test_features_have_no_seconds(hears: Model) -> None:
    features = np.zeros((3, 80, 3000), np.float32) + np.arange(3, dtype=np.float32)[:, None, None]
    samples = read({"input_features": features}, hears, seconds=0.5)
    assert (len(samples), samples.counts.seconds) == (3, None)


def test_what_is_wrong_with_sounds_is_told_with_their_lines(hears: Model, tmp_path: Path) -> None:
    wav(tmp_path / "long.wav", 30.5)
    wav(tmp_path / "good.wav", 0.5)
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "folder").mkdir()
    lines = ["long.wav\ta", "good.wav\tb", "text.wav\tc", "none.wav\td", "folder\te", "\tf"]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    with pytest.raises(InputError) as raised:
        read(tmp_path / "a.tsv", hears)
    message = str(raised.value)
    assert "which takes audio" in message
    for part in (
        "a.tsv:1: expected at most 30 s, all that the model hears at once, found 30.50",
        f"a.tsv:3: {tmp_path / 'text.wav'}: expected sound",
        "a.tsv:4: expected the path of an audio file, found no such file: 'none.wav'",
        "a.tsv:5: expected the path of an audio file, found a folder: 'folder'",
        "a.tsv:6: expected a file before the text",
    ):
        assert part in message
    assert "a.tsv:2" not in message


def test_a_damaged_sound_is_told_before_anything_is_computed(hears: Model) -> None:
    damaged = np.full(RATE, np.nan, np.float32)
    with pytest.raises(InputError, match=r"item 1: .*expected finite samples"):
        read([np.zeros(RATE, np.float32), damaged], hears)
    with pytest.raises(InputError, match="item 0: expected a path or a float array of samples, found list"):
        read([[0.0, 0.5, 0.0]], hears)


def test_samples_of_sound(tmp_path: Path) -> None:
    plain = model(tmp_path, WAVEFORM, inputs=SOUND_INPUTS)
    samples = read([(np.zeros(500, np.float32), None), np.ones(900, np.float32)], plain)
    assert sorted(sample.feeds["input_values"].shape for sample in samples) == [(1, 500), (1, 900)]
    with pytest.raises(InputError, match=r"(?s)item 0: .*at most 1 s.*item 1: .*at least 0.025 s"):
        read([np.zeros(2 * RATE, np.float32), np.zeros(300, np.float32)], plain)


def test_images(tmp_path: Path) -> None:
    sees = model(tmp_path, IMAGE, inputs=IMAGE_INPUTS)
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    (tmp_path / "a.tsv").write_text("red.png\n")
    samples = read(tmp_path / "a.tsv", sees)
    assert samples[0].feeds["pixel_values"].shape == (1, 3, 8, 8)
    assert samples[0].source == "red.png"
    (tmp_path / "a.tsv").write_text("red.png\na.tsv\n")
    with pytest.raises(InputError, match=r"a\.tsv:2: .*expected an image"):
        read(tmp_path / "a.tsv", sees)
    assert len(read([Image.new("RGB", (9, 7)), Image.new("L", (9, 7))], sees)) == 2
