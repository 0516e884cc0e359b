"""From what a user has to samples: the artifact's own front end, one draw, one hash, all problems at once."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.models import IMAGE, IMAGE_INPUTS, SOUND_INPUTS, WAVEFORM, model
from tests.runtime.artifacts import tensor
from tests.runtime.test_audio import FRONTEND as AUDIO
from txopt.calibration.data import read
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError
from txopt.runtime.model import Model, load

WORDS = {"cat": "K AE1 T", "dog": "D AA1 G", "transformer": "T R AE0 N S F AO1 R M ER0", "frog": "F R AA1 G"}


@pytest.fixture(scope="module")
def reader(g2p: Artifact) -> Model:
    return load(g2p.path)


def of(samples: Samples) -> list[tuple[str, str | None]]:
    return sorted(((sample.source, sample.reference) for sample in samples), key=str)


def test_samples_are_what_serving_reads(reader: Model, tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("source,target\n" + "\n".join(f"{w},{said}" for w, said in WORDS.items()))
    samples = read(tmp_path / "words.csv", reader)
    assert of(samples) == sorted(WORDS.items())
    for sample in samples:
        served, _ = reader.pipeline("text").prepare([sample.source])
        assert sample.feeds.keys() == served.keys()
        assert all(np.array_equal(sample.feeds[name], served[name]) for name in served)
        assert sample.prompt.tolist() == [1]
        assert sample.labels is not None
        assert reader.pipeline("text").text(sample.labels) == sample.reference
        assert sample.labels[-1] == reader.manifest.generation["eos_token_id"]
    assert samples.counts.references == samples.counts.samples == 4
    assert samples.counts.places == sum(len(word) + 1 for word in WORDS)


def test_teacher_forcing_on_the_labels_is_what_the_model_says(reader: Model) -> None:
    samples = read(WORDS.items(), reader)
    for sample in samples:
        assert sample.labels is not None
        fed = np.concatenate([sample.prompt, sample.labels[:-1]])[None]
        logits = reader.decode(reader.encode(**sample.feeds)).feed(fed)
        assert logits[0].argmax(-1).tolist() == sample.labels.tolist()


def test_what_the_model_says_is_read_back_as_the_ids_it_said(reader: Model) -> None:
    pipeline, words = reader.pipeline("text"), ["onomatopoeia", "verified", "transformers", "x", "don't"]
    samples = read(list(zip(words, pipeline(words), strict=True)), reader)
    for sample in samples:
        said = reader.generate(**sample.feeds, decoder_input_ids=sample.prompt[None]).sequences[0]
        assert sample.labels is not None
        assert said.tolist() == [*sample.prompt, *sample.labels]


def test_the_draw_and_the_hash_know_neither_order_nor_path_nor_format(reader: Model, tmp_path: Path) -> None:
    items = [(f"word{'abcdefghij'[n % 10]}{'x' * (n % 13)}", "AH0" if n % 3 else None) for n in range(100)]
    first = read(items, reader, limit=20)
    shuffled = [*items]
    random.Random(1).shuffle(shuffled)
    (tmp_path / "other.csv").write_text(
        "target,source\n" + "\n".join(f"{said or ''},{word}" for word, said in shuffled), "utf-8-sig"
    )
    again = read(tmp_path / "other.csv", reader, limit=20)
    assert [sample.source for sample in again] == [sample.source for sample in first]
    assert again.sha256 == first.sha256
    assert len(first) == 20
    assert read(items, reader, limit=20, seed=1).sha256 != first.sha256
    assert read(items, reader, limit=None, seed=1).sha256 == read(items, reader, limit=None).sha256
    assert read([*WORDS.items()], reader).sha256 != read([*WORDS], reader).sha256


def test_sources_that_come_twice_are_left_out_and_said(reader: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = read(["cat", "cat", ("cat", "K AE1 T"), "cat"], reader)
    assert of(samples) == [("cat", "K AE1 T"), ("cat", None)]
    assert samples.counts.duplicates == 2
    assert "items: sources left out, as they were there before with the same reference: 2" in caplog.messages


def test_long_texts_are_cut_as_in_serving_and_said_once(reader: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = read(["a" * 100, "b" * 200, "c" * 63, "d"], reader)
        widths = sorted(sample.feeds["input_ids"].shape[1] for sample in samples)
    assert widths == [2, 64, 64, 64]
    assert caplog.messages == ["items: sources longer than the model reads, and cut as in serving: 2"]


def test_progress_is_told(reader: Model) -> None:
    told: list[tuple[int, int]] = []
    read([*WORDS], reader, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_generator_is_read_once_and_not_kept(reader: Model) -> None:
    def words() -> Iterator[str]:
        for number in range(1000):
            yield "".join("abcdefghij"[int(digit)] for digit in str(number))

    samples = read(words(), reader, limit=5)
    assert (len(samples), samples.counts.found, samples.counts.duplicates) == (5, 1000, 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "items: expected at least one source, found none"),
        (
            ["cat", 5, None, "  "],
            "(?s)takes text:.*item 1: expected a text, .*found int.*item 2: .*item 3: .*but spaces",
        ),
        ([np.zeros(400, np.float32)], "item 0: expected a text, as this artifact takes, found ndarray"),
        (["clips/one.wav", "two.flac"], "(?s)item 0: expected a text, found the name of a file.*item 1:"),
        (["cat", "\ud800"], "item 1: these texts cannot be encoded: text 0: expected text that UTF-8 can write"),
        (5, "expected a path, an iterable of sources, .*found int"),
        (b"cat", "found bytes"),
        (np.zeros(3), "found ndarray"),
    ],
)
def test_what_are_no_texts(items: Any, message: str, reader: Model) -> None:
    with pytest.raises(InputError, match=message):
        read(items, reader)


def test_a_file_of_blank_lines_is_empty(reader: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n \r\n\n")
    with pytest.raises(InputError, match=r"a\.txt: expected at least one source, found none"):
        read(tmp_path / "a.txt", reader)


def test_limits_that_are_none(reader: Model) -> None:
    with pytest.raises(InputError, match="limit: expected a number of samples of at least 1, or None, found 0"):
        read(["cat"], reader, limit=0)
    with pytest.raises(InputError, match=r"seconds=5: .*for an artifact that takes audio; it takes text"):
        read(["cat"], reader, seconds=5)


# Arrays


def padded(*rows: list[int], pad: int = 0) -> np.ndarray[Any, Any]:
    width = max(map(len, rows))
    return np.array([row + [pad] * (width - len(row)) for row in rows])


ARRAYS = {
    "input_ids": padded([7, 5, 24, 2], [8, 2], [9, 5, 2]),
    "attention_mask": padded([1, 1, 1, 1], [1, 1], [1, 1, 1]),
    "labels": padded([45, 8, 60, 2], [45, 2], [-100], pad=-100),
}


def test_arrays_lose_their_padding_and_keep_their_labels(reader: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    samples = read(tmp_path / "a.npz", reader)
    found = {
        tuple(sample.feeds["input_ids"][0].tolist()): None if sample.labels is None else sample.labels.tolist()
        for sample in samples
    }
    assert found == {(7, 5, 24, 2): [45, 8, 60, 2], (8, 2): [45, 2], (9, 5, 2): None}
    assert all(sample.feeds["attention_mask"].all() for sample in samples)
    items = [{name: value[row] for name, value in ARRAYS.items()} for row in (2, 0, 1)]
    assert read(items, reader).sha256 == read(ARRAYS, reader).sha256 == samples.sha256
    batch = [{name: value[:2] for name, value in ARRAYS.items()}, {name: value[2:] for name, value in ARRAYS.items()}]
    assert read(batch, reader).counts.samples == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.full((3, 4), 99)}, r"(?s)a\.npz\[0\]: .*source vocabulary, 0 to 30, got 99.*a\.npz\[2\]"),
        ({"attention_mask": padded([1], [0], [1, 1])}, r"a\.npz: the inputs do not fit the model"),
        ({"attention_mask": padded([1, 1, 1, 1], [0], [1])}, r"a\.npz\[1\]: attention_mask: .*found padding alone"),
        ({"pixels": np.zeros((3, 4))}, r"(?s)a\.npz: .*pixels: unknown; expected input_ids, attention_mask"),
        ({"labels": np.zeros((2, 4), np.int64)}, r"labels: expected numbers .*\[3,L\], .*found int64 \[2, 4\]"),
        (
            {"labels": np.zeros((3, 4))},
            r"a\.npz\[0\]: labels: expected integers \[L\] of each sample, found float64 \[4\]",
        ),
        (
            {"labels": np.zeros(3, np.int64)},
            r"a\.npz\[0\]: labels: expected integers \[L\] of each sample, found int64 \[\]",
        ),
        ({"labels": np.full((3, 2), 4711)}, r"(?s)a\.npz\[0\]: labels: expected ids of 0 to 72, .*found 4711"),
        ({"input_ids": np.zeros((3, 4), object)}, "expected an .npz archive of arrays of numbers"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], message: str, reader: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{**ARRAYS, **change})
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.npz", reader)


def test_what_is_no_archive(reader: Model, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"a\.npz: expected an \.npz archive"):
        read(tmp_path / "a.npz", reader)
    with pytest.raises(InputError, match="item 1: expected arrays by name, as the first item has, found str"):
        read([{"input_ids": [8, 2]}, "cat"], reader)


def test_an_artifact_of_arrays_takes_arrays_alone(tmp_path: Path) -> None:
    plain = model(tmp_path, {"type": "arrays"})
    assert len(read({"input_ids": [[5, 6], [7, 8]]}, plain)) == 2
    with pytest.raises(InputError, match="expected mappings of the encoder's inputs by name, found 'str'"):
        read(["cat"], plain)


# Nothing


@pytest.mark.parametrize(
    ("facts", "inputs", "what"),
    [
        (AUDIO, (tensor("input_features", "float32", "B", 80, 3000),), "tones and bursts of noise"),
        (WAVEFORM, SOUND_INPUTS, "tones and bursts of noise"),
        (IMAGE, IMAGE_INPUTS, "images of noise"),
        ({"type": "arrays", "source_positions": 20}, None, "random arrays"),
        (
            {"type": "arrays"},
            (tensor("states", "float32", "B", "T", 6), tensor("attention_mask", "int64", "B", "T")),
            "",
        ),
    ],
)
def test_without_data_there_are_random_ones_and_a_warning(
    facts: dict[str, Any], inputs: Any, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = model(tmp_path, facts, inputs=inputs)
    with caplog.at_level(logging.WARNING):
        samples = read(None, artifact, limit=4)
    assert (len(samples), samples.synthetic) == (4, True)
    (message,) = caplog.messages
    assert message.startswith("synthetic: no calibration data: 4 samples were made up, " + what)
    assert "measured losses mean little" in message
    assert samples.sha256 == read(None, artifact, limit=4).sha256 != read(None, artifact, limit=4, seed=1).sha256
    for sample in samples:
        for value in sample.feeds.values():
            assert np.isfinite(value).all()
        assert sample.labels is None


def test_random_texts_are_words_of_the_model_of_many_lengths(reader: Model) -> None:
    samples = read(None, reader)
    widths = [sample.feeds["input_ids"].shape[1] for sample in samples]
    assert min(widths) <= 4
    assert 40 < max(widths) <= 64
    ids = np.concatenate([sample.feeds["input_ids"][0, :-1] for sample in samples])
    assert ids.min() > 2  # no padding, no beginning, no end
    assert len(set(ids.tolist())) > 20


def test_ids_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input_ids: expected a vocabulary to draw random ids from"):
        read(None, model(tmp_path, {"type": "arrays", "source_vocabulary": None}))


def test_halves_of_a_model(reader: Model, tmp_path: Path) -> None:
    for file in reader.artifact.path.glob("*tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = {"type": "text", "tokenizer": "tokenizer.json", "target_tokenizer": "target_tokenizer.json"}
    (encoded,) = read([("cat", "K")], model(tmp_path, text, kind="encoder"))
    assert (encoded.labels, encoded.prompt.size, encoded.reference) == (None, 0, "K")
    (continued,) = read([("cat", "K AE1")], model(tmp_path, text, kind="decoder"))
    assert continued.prompt.size == 0
    assert continued.labels is not None
    assert continued.labels.tolist() == [45, 8, 2]


def test_the_certificate_says_what_there_was(reader: Model) -> None:
    document = read([("cat", "K AE1 T"), "dog", "dog"], reader).to_json()
    assert len(document.pop("sha256")) == 64
    assert document == {
        "synthetic": False,
        "found": 3,
        "duplicates": 1,
        "samples": 2,
        "references": 1,
        "places": 8,
        "label_tokens": 4,
        "seconds": None,
        "notices": ["sources left out, as they were there before with the same reference: 1"],
    }
