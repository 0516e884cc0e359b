"""Batches: what serving would make of the same sources together, and labels where they are needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.models import decoder_ids, model
from tests.runtime.artifacts import tensor
from txopt.calibration.batches import batches
from txopt.calibration.data import read
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model, load
from txopt.runtime.pipeline import Pipeline

WORDS = {
    "cat": "K AE1 T",
    "dogs": "D AA1 G Z",
    "frog": "F R AA1 G",
    "transformer": "T R AE0 N S F AO1 R M ER0",
    "it": "IH1 T",
}


@pytest.fixture(scope="module")
def reader(g2p: Artifact) -> Model:
    return load(g2p.path)


def test_every_sample_comes_once_the_longest_first(reader: Model) -> None:
    samples = read([*WORDS.items(), "unheard", "of"], reader)
    told: list[tuple[int, int]] = []
    made = list(batches(samples, 2, progress=lambda done, total: told.append((done, total))))
    assert sorted(index for batch in made for index in batch.indices) == list(range(7))
    assert told[-1] == (7, 7)
    widths = [batch.feeds["input_ids"].shape[1] for batch in made if batch.labels is not None]
    assert widths == sorted(widths, reverse=True)
    assert [batch.labels is None for batch in made] == [False, False, False, True]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_is_what_serving_would_make_of_it(reader: Model, size: int) -> None:
    samples = read(WORDS.items(), reader)
    for batch in batches(samples, size):
        served, _ = reader.pipeline("text").prepare([samples[index].source for index in batch.indices])
        assert batch.feeds.keys() == served.keys()
        for name, value in served.items():
            np.testing.assert_array_equal(batch.feeds[name], value)


def test_every_label_has_its_answer(reader: Model) -> None:
    samples = read(WORDS.items(), reader)
    (batch,) = batches(samples, 8)
    assert batch.labels is not None
    logits = reader.decode(reader.encode(**batch.feeds)).feed(decoder_ids(batch))
    answered = logits[:, batch.prompt.shape[1] - 1 :].argmax(-1)
    assert answered.shape == batch.labels.shape
    heard = batch.labels >= 0
    assert (answered == batch.labels)[heard].all()
    assert batch.lengths.tolist() == heard.sum(1).tolist()
    assert (batch.labels[~heard] == -100).all()


def test_sounds_are_padded_as_in_serving(tmp_path: Path) -> None:
    facts = {"type": "waveform", "sampling_rate": 16_000, "padding_value": 0.5, "do_normalize": True}
    inputs = (tensor("input_values", "float32", "B", "N"), tensor("attention_mask", "int64", "B", "N"))
    hears = model(tmp_path, facts, inputs=inputs)
    sounds = [np.random.default_rng(n).normal(0, 0.1, 400 + 50 * n).astype(np.float32) for n in range(3)]
    samples = read(sounds, hears)
    (batch,) = batches(samples, 3)
    ordered = [sounds[int(samples[index].where.split()[1])] for index in batch.indices]
    served, _ = Pipeline(hears).prepare(ordered)
    np.testing.assert_array_equal(batch.feeds["input_values"], served["input_values"])
    np.testing.assert_array_equal(batch.feeds["attention_mask"], served["attention_mask"])


def test_prompts_of_a_decoder_alone_are_padded_on_the_left(tmp_path: Path) -> None:
    continues = model(tmp_path, {"type": "arrays", "pad_token_id": 9}, kind="decoder")
    arrays = {"input_ids": [[9, 5, 6], [7, 8, 4]], "attention_mask": [[0, 1, 1], [1, 1, 1]], "labels": [[3, 2], [1, 2]]}
    samples = read(arrays, continues)
    assert sorted(sample.feeds["input_ids"].shape[1] for sample in samples) == [2, 3]
    (batch,) = batches(samples, 2)
    assert batch.feeds["input_ids"].tolist() == [[7, 8, 4], [9, 5, 6]]
    assert batch.feeds["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.prompt.shape == (2, 0)
    assert decoder_ids(batch).tolist() == [[1], [3]]


def test_lengths_that_no_mask_is_about_are_not_padded(tmp_path: Path) -> None:
    inputs = (tensor("states", "float32", "B", "T", 2),)
    plain = model(tmp_path, {"type": "arrays"}, inputs=inputs)
    items: list[dict[str, Any]] = [
        {"states": np.full((width, 2), n, np.float32)} for n, width in enumerate((3, 5, 3, 5, 5))
    ]
    made = list(batches(read(items, plain), 8))
    assert sorted(batch.feeds["states"].shape for batch in made) == [(2, 3, 2), (3, 5, 2)]


def test_several_memories_are_padded_each_by_its_mask(tmp_path: Path) -> None:
    inputs = (
        tensor("input_ids", "int64", "B", "T"),
        tensor("attention_mask", "int64", "B", "T"),
        tensor("states", "float32", "B", "U", 2),
    )
    both = model(tmp_path, {"type": "arrays"}, inputs=inputs)
    first = {"input_ids": [5, 6, 7], "states": np.ones((4, 2), np.float32)}
    second = {"input_ids": [8], "states": np.ones((4, 2), np.float32)}
    (batch,) = batches(read([first, second], both), 2)
    assert batch.feeds["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_size_that_is_none(reader: Model) -> None:
    with pytest.raises(UsageError, match="size: expected an integer, at least 1, got 0"):
        list(batches(read(["a"], reader), 0))
