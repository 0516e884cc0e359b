"""Checkpoints that are not what they say: refused, named, before anything is made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.numpy import load_file, save_file

from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    t.BertForSequenceClassification(t.BertConfig(**SIZES)).save_pretrained(source)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("classifier.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights.*\n.*classifier\.weight"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HEADS: dict[str, Callable[[], Any]] = {
    "BertForMaskedLM": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "T5Model": lambda: t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    "GPT2Model": lambda: t.GPT2Model(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_no_road_carries_is_named(name: str, tmp_path: Path) -> None:
    HEADS[name]().save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=name):
        export(tmp_path / "source", tmp_path / "out")


def test_a_truncated_file_is_the_sources_fault(tmp_path: Path) -> None:
    t.BertModel(t.BertConfig(**SIZES)).save_pretrained(tmp_path / "source")
    (file,) = (tmp_path / "source").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot load it as BertModel"):
        export(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "problem", "by_hand"),
    [
        (1, None, torch.sigmoid),
        (3, "multi_label_classification", torch.sigmoid),
        (2, "regression", lambda x: x),
        (3, None, lambda x: x.softmax(-1)),
    ],
)
def test_scores_are_what_the_checkpoint_says(labels: int, problem: str | None, by_hand: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=labels, problem_type=problem)).eval()
    module.save_pretrained(tmp_path / "source")
    ids = np.array([[3, 4, 5]])
    got = Model(export(tmp_path / "source", tmp_path / "out")).classify(input_ids=ids)
    with torch.no_grad():
        np.testing.assert_allclose(got, by_hand(module(torch.from_numpy(ids)).logits).numpy(), rtol=0, atol=1e-5)
