"""Whole models as torch's old exporter writes them, of fourteen architectures: every attention block and norm fuses, proved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from txopt.benchmarks.foreign_models import NAMES, Size, build, write
from txopt.exporter import foreign

WINDOWED = {"LED": 2}  # blocks of its encoder, which attend within windows


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_everything_fuses_and_is_proved(name: str, tmp_path: Path) -> None:
    model = build(name, Size())
    write(model, "torchscript", tmp_path / "in.onnx")
    report = foreign.optimize(tmp_path / "in.onnx", tmp_path / "out")
    windows = WINDOWED.get(name, 0)
    assert report.fusions["Attention"] == {"fused": model.blocks - windows, "refused": []}
    assert report.fusions["Attention.windows"] == {"fused": windows, "refused": []}
    assert report.operators["Attention"] == model.blocks
    assert "Softmax" not in report.operators
    assert report.operators.get("LayerNormalization", 0) + report.operators.get("RMSNormalization", 0) == model.norms
    assert report.parity["largest_error"] < 1e-5


ROTATED: dict[str, Callable[[], Any]] = {
    "GPT-J": lambda: t.GPTJModel(
        t.GPTJConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, use_cache=False)
    ),
    "RoFormer": lambda: t.RoFormerModel(
        t.RoFormerConfig(
            vocab_size=64,
            embedding_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ),
}


class States(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter and transformers warn of themselves
@pytest.mark.parametrize("name", ROTATED)
def test_masks_of_unknown_lengths_do_not_open_attention(name: str, tmp_path: Path) -> None:
    """Nothing says that the mask is as long as the scores, so the length behind them is not Q's for certain."""
    torch.manual_seed(0)
    ids, axes = torch.randint(3, 60, (2, 7)), {0: "batch", 1: "length"}
    torch.onnx.export(
        States(ROTATED[name]().eval()),
        (ids, torch.ones_like(ids)),
        str(tmp_path / "in.onnx"),
        dynamo=False,
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes},
    )
    report = foreign.optimize(tmp_path / "in.onnx", tmp_path / "out")
    assert report.fusions["Attention"] == {"fused": 2, "refused": []}
    assert report.parity["largest_error"] < 1e-5
