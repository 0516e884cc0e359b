"""Attention in graphs that other exporters wrote: torch's two, for whole models and for modules; every block must fuse."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as t
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from tests.exporter.plain_engine import run, scale_attention
from txopt.exporter.fusion.attention import fuse
from txopt.exporter.graph import count

Array = NDArray[Any]

FP32 = {"rtol": 0.0, "atol": 1e-5}


class Feeds(torch.nn.Module):
    """``model`` with positional inputs under these names, and one output of what it gives."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], output: str, **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.options = model, names, output, options

    def forward(self, *inputs: torch.Tensor) -> Any:
        results = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return results[0] if self.output == "0" else results[self.output]


class Hand(torch.nn.Module):
    """Attention as it is written by hand."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hide: torch.Tensor) -> tuple[torch.Tensor]:
        scores = torch.matmul(q, k.transpose(-2, -1)) / q.size(-1) ** 0.5
        return (torch.matmul(scores.masked_fill(hide, float("-inf")).softmax(dim=-1), v),)


class Sdpa(torch.nn.Module):
    """Attention by torch's function."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep),)


_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}

Case = tuple["Feeds", tuple[torch.Tensor, ...], tuple[dict[int, str], ...], int]


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 38, (2, length))


def _padding() -> torch.Tensor:
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def _text(model: Any) -> Case:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    axes = {0: "batch", 1: "source"}
    inputs = (_tokens(7), _padding(), _tokens(5))
    return Feeds(model, names, "logits", use_cache=False), inputs, (axes, axes, {0: "batch", 1: "target"}), 6


def _text_encoder(model: Any) -> Case:
    axes = {0: "batch", 1: "source"}
    names = ("input_ids", "attention_mask")
    return Feeds(model.get_encoder(), names, "last_hidden_state"), (_tokens(7), _padding()), (axes, axes), 2


def _speech(model: Any) -> Case:
    axes = {0: "batch", 1: "target"}
    names = ("input_features", "decoder_input_ids", "decoder_attention_mask")
    inputs = (_numbers(2, 8, 60), _tokens(5), torch.ones(2, 5, dtype=torch.int64))
    return Feeds(model, names, "logits", use_cache=False), inputs, ({0: "batch"}, axes, axes), 6


def _speech_encoder(model: Any) -> Case:
    return (
        Feeds(model.get_encoder(), ("input_features",), "last_hidden_state"),
        (_numbers(2, 8, 60),),
        ({0: "batch"},),
        2,
    )


def _multihead(*, need_weights: bool) -> Case:
    model = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    names = ("query", "key", "value", "key_padding_mask")
    source = {0: "batch", 1: "source"}
    memory = _numbers(2, 7, 16)
    inputs = (_numbers(2, 5, 16), memory, memory + 1, _padding() == 0)
    axes = ({0: "batch", 1: "target"}, source, source, source)
    return Feeds(model, names, "0", need_weights=need_weights), inputs, axes, 1


def _by_head(module: torch.nn.Module, mask_name: str) -> Case:
    long = {0: "batch", 2: "source"}
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[..., 0] = mask_name == "keep"
    inputs = (_numbers(2, 3, 5, 8), _numbers(2, 3, 7, 8), _numbers(2, 3, 7, 8), mask)
    axes = ({0: "batch", 2: "target"}, long, long, {0: "batch", 2: "target", 3: "source"})
    return Feeds(module, ("q", "k", "v", mask_name), "0"), inputs, axes, 1


def _t5() -> Any:
    return t.T5ForConditionalGeneration(t.T5Config(**_T5, decoder_start_token_id=0))


def _bart() -> Any:
    return t.BartForConditionalGeneration(t.BartConfig(**_SIZES, max_position_embeddings=64))


def _marian() -> Any:
    return t.MarianMTModel(t.MarianConfig(**_SIZES, max_position_embeddings=64))


def _whisper() -> Any:
    config = t.WhisperConfig(**_SIZES, num_mel_bins=8, max_source_positions=30, max_target_positions=32)
    return t.WhisperForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Case]] = {
    "by hand": lambda: _by_head(Hand(), "hide"),
    "F.scaled_dot_product_attention": lambda: _by_head(Sdpa(), "keep"),
    "nn.MultiheadAttention": lambda: _multihead(need_weights=False),
    "nn.MultiheadAttention with weights": lambda: _multihead(need_weights=True),
    "T5": lambda: _text(_t5()),
    "T5 encoder": lambda: _text_encoder(_t5()),
    "BART": lambda: _text(_bart()),
    "BART encoder": lambda: _text_encoder(_bart()),
    "Marian": lambda: _text(_marian()),
    "Whisper": lambda: _speech(_whisper()),
    "Whisper encoder": lambda: _speech_encoder(_whisper()),
}

WHOLE = ("T5", "BART", "Marian", "Whisper")


def _sharpened(module: torch.nn.Module) -> torch.nn.Module:
    """With projections large enough for attention to show in the output."""
    for name, weight in module.named_parameters():
        if weight.dim() == 2 and any(part in name.lower() for part in ("attn", "attention", "in_proj")):
            torch.nn.init.normal_(weight, std=0.5)
    return module.eval()


def foreign(case: Case, *, dynamo: bool) -> ir.Model:
    """As either of torch's exporters writes it, at opset 24 with its constants folded."""
    module, inputs, axes, _ = case
    names = [f"input_{index}" for index in range(len(inputs))]
    file = io.BytesIO()
    if dynamo:
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            input_names=names,
            dynamic_shapes=(tuple(dict.fromkeys(shape, torch.export.Dim.DYNAMIC) for shape in axes),),
            opset_version=18,
            verbose=False,
        )
        assert program is not None
        program.save(file)
    else:
        torch.onnx.export(
            module,
            inputs,
            file,
            dynamo=False,
            input_names=names,
            dynamic_axes=dict(zip(names, axes, strict=True)),
            opset_version=17,
        )
    proto = onnx.version_converter.convert_version(onnx.load_from_string(file.getvalue()), 24)
    proto.ir_version = 10
    model = ir.from_proto(proto)
    lift = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    model = passes.IdentityEliminationPass()(lift(model).model).model
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    return passes.RemoveUnusedNodesPass()(model).model


@pytest.mark.filterwarnings("ignore")  # both exporters and transformers warn of themselves
@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        pytest.param(name, dynamo, marks=[pytest.mark.slow] if dynamo and name in WHOLE else [])
        for name in MODELS
        for dynamo in (True, False)
    ],
)
def test_every_attention_of_an_exported_model_fuses(name: str, dynamo: bool) -> None:
    torch.manual_seed(0)
    case = MODELS[name]()
    module, inputs, _, blocks = case
    if isinstance(module.model, t.PreTrainedModel):
        module.model.set_attn_implementation("eager")
    _sharpened(module)
    graph = foreign(case, dynamo=dynamo)
    given = {str(value.name): inputs[int(str(value.name)[6:])].numpy() for value in graph.graph.inputs}
    before = run(graph, given)[0]
    assert count(graph)["Softmax"] == blocks
    report = fuse(graph)
    assert (report.fused, report.refused) == (blocks, [])
    assert "Softmax" not in count(graph)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, given)[0], before, **FP32)
    scale_attention(graph, 1.5)
    assert not np.allclose(run(graph, given)[0], before, **FP32), "the output would not show a broken attention"
