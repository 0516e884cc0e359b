"""A decoder with groups of heads, as transformers has Llama: buffers of the few heads, by both of torch's exporters."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from tests.exporter.cached_decoders import InTurn, exported
from tests.exporter.test_in_place_cache import check_buffers, turned
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import SourceError

LAYERS, HEADS, FEW, SIZE, WORDS = 2, 4, 2, 8, 40
PASTS = [f"past_{kind}.{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
PRESENTS = [name.replace("past", "present") for name in PASTS]

pytestmark = pytest.mark.slow


class WithPast(nn.Module):
    """A causal model of transformers with its past as inputs and outputs."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = t.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=HEADS * SIZE,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=FEW,
            max_position_embeddings=128,
        )
        self.model = t.LlamaForCausalLM(config).eval()
        self.model.set_attn_implementation(attention)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(4)  # so that attention shows in the logits

    def forward(self, ids: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        cache = t.DynamicCache(zip(pasts[::2], pasts[1::2], strict=True))
        found = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return (found.logits, *(value for layer in cache.layers for value in (layer.keys, layer.values)))


def written(folder: Path, attention: str, *, dynamo: bool) -> Path:
    file, past = folder / "in.onnx", {0: "batch", 2: "past"}
    arguments = (torch.ones(2, 3, dtype=torch.int64), *(torch.zeros(2, FEW, 6, SIZE) for _ in PASTS))
    names: dict[str, Any] = {"input_names": ["ids", *PASTS], "output_names": ["logits", *PRESENTS], "opset_version": 18}
    ids = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        if dynamo:
            dims = {name: torch.export.Dim(name) for name in ("batch", "length", "past")}
            of_ids, of_past = ({axis: dims[name] for axis, name in axes.items()} for axes in (ids, past))
            shapes = (of_ids, (of_past,) * len(PASTS))
            torch.onnx.export(
                WithPast(attention), arguments, file, dynamo=True, dynamic_shapes=shapes, verbose=False, **names
            )
        else:
            axes = {"ids": ids, "logits": ids, **dict.fromkeys(PASTS, past)}
            axes |= {name: {0: "batch", 2: "present"} for name in PRESENTS}
            torch.onnx.export(WithPast(attention), arguments, file, dynamo=False, dynamic_axes=axes, **names)
    return file


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_buffers_of_a_llama_hold_the_few_heads(attention: str, dynamo: bool, tmp_path: Path) -> None:
    file = written(tmp_path, attention, dynamo=dynamo)
    report = turned(file, tmp_path / "out")
    assert report.parity["largest_error"] < 1e-5
    assert report.fusions["Attention.groups"] == {"fused": LAYERS, "refused": []}
    assert report.operators["Attention"] == LAYERS
    model = check_buffers(tmp_path / "out", dict(zip(PASTS, PRESENTS, strict=True)))
    assert {value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.input if value.name in PASTS} == {
        FEW
    }
    check_steps(file, tmp_path / "out" / "model.onnx")


def check_steps(file: Path, turned: Path) -> None:
    """A prompt of three tokens and four steps over one buffer of sixteen places, junk behind what is filled."""
    original, runner, random = Runner(file), Runner(turned), np.random.default_rng(0)
    ids = random.integers(0, WORDS, (2, 7))
    pasts = {name: np.zeros((2, FEW, 0, SIZE), np.float32) for name in PASTS}
    buffers = {name: 30 * random.normal(size=(2, FEW, 16, SIZE)).astype(np.float32) for name in PASTS}
    first = 0
    for count in (3, 1, 1, 1, 1):
        new = {"ids": ids[:, first : first + count]}
        expected = {name: original.array(value) for name, value in original.run({**new, **pasts}).items()}
        asked = {**new, **buffers, "cache_position": np.array([first])}
        found = {name: runner.array(value) for name, value in runner.run(asked).items()}
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)
        pasts, buffers = (
            {past: one[present] for past, present in zip(PASTS, PRESENTS, strict=True)} for one in (expected, found)
        )
        first += count


def test_heads_that_are_repeated_in_turn_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"\(Expand\) reads present_key.0(.|\n)*repeats all heads one after the other"
    ):
        turned(exported(InTurn, tmp_path, dynamo=True), tmp_path / "out")
