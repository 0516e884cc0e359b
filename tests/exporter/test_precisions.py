"""Half precision: exported, verified against float32 arithmetic on the same rounded weights, and stored in it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from txopt.exporter.lowering import tensorrt
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model
from txopt.runtime.parity import TOLERANCE, verify

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, checkpoints: Make) -> Callable[[str], Artifact]:
    directory = tmp_path_factory.mktemp("halves")
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            made[name] = export(
                calm(checkpoints(name), directory / f"{name}-checkpoint"), directory / name, precision="fp16"
            )
        return made[name]

    return make


def calm(source: Path, target: Path) -> Path:
    """The checkpoint with its matrices halved: as they are, they lift float16's rounding in T5 to 4 % of the logits."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: v / 2 if v.ndim > 1 else v for k, v in tensors.items()}, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_float16_is_verified_and_says_so(name: str, halves: Callable[[str], Artifact]) -> None:
    manifest = halves(name).manifest
    assert manifest.precision == manifest.parity["precision"] == "fp16"
    assert manifest.parity["tolerance"] == TOLERANCE["fp16"]
    assert manifest.parity["passed"]
    assert verify(halves(name).path).passed


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_float16_weights_and_caches_but_float32_logits(name: str, halves: Callable[[str], Artifact]) -> None:
    artifact = halves(name)
    assert artifact.manifest.cache is not None
    assert artifact.manifest.cache.dtype == "float16"
    graph = onnx.load(artifact.file("decoder.onnx"), load_external_data=False).graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    assert {types[key] for key in types if "key" in key or "value" in key} == {onnx.TensorProto.FLOAT16}
    large = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) >= 1024}
    # T5 keeps the second projection of its feed-forward block in float32: in float16 it overflows.
    assert large <= {onnx.TensorProto.FLOAT16, *([onnx.TensorProto.FLOAT] if name == "t5" else [])}


def test_norms_fuse_in_float16_too(halves: Callable[[str], Artifact]) -> None:
    assert halves("t5").manifest.fusion["decoder"]["nodes"]["RMSNormalization"] == 7


def test_float16_and_float32_mostly_say_the_same(
    halves: Callable[[str], Artifact], checkpoints: Make, tmp_path: Path
) -> None:
    whole = export(calm(checkpoints("bart"), tmp_path / "checkpoint"), tmp_path / "whole")
    ids = np.random.default_rng(0).integers(5, 90, (2, 6))
    tokens = np.random.default_rng(1).integers(5, 90, (2, 8))
    logits = []
    for artifact in (halves("bart"), whole):
        model = Model(artifact)
        logits.append(model.decode(model.encode(input_ids=ids, attention_mask=np.ones_like(ids))).prefill(tokens))
    scale = np.abs(logits[1]).max()
    assert np.abs(logits[0] - logits[1]).max() <= 5e-2 * scale


def test_bfloat16_on_the_cpu_is_float32_arithmetic_on_bfloat16_weights(tmp_path: Path) -> None:
    """sqrt(48), which scales the embedding, is no bfloat16: traced in that dtype it would be off by 0.1 %."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 80}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.MarianConfig(**sizes, **heads, **ids, scale_embedding=True, init_std=0.5)
    transformers.MarianMTModel(config).save_pretrained(tmp_path / "source")
    artifact = export(tmp_path / "source", tmp_path / "out", precision="bf16")
    assert artifact.manifest.parity["tolerance"] == TOLERANCE["fp32"]
    assert artifact.manifest.cache is not None
    assert artifact.manifest.cache.dtype == "float32"
    graph = onnx.load(artifact.file("decoder.onnx"), load_external_data=False).graph
    large = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) >= 1024}
    assert large == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_module_that_is_exported_in_half_precision_stays_as_it_was(precision: str, tmp_path: Path) -> None:
    from txopt.examples.g2p.model import factory

    module = factory()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, tmp_path / "out", precision=precision)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {value.dtype for value in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_artifact_for_tensorrt_is_neutral_and_proved_on_onnx_runtime(precision: str, tmp_path: Path) -> None:
    """Heads are cut by the graph, not by Attention, as the trace has them; bfloat16 is stored, and engines compute in it."""
    artifact = export("txopt.examples.g2p.model:factory", tmp_path / "out", target="tensorrt", precision=precision)
    assert (artifact.manifest.precision, artifact.manifest.target) == (precision, "tensorrt")
    found = verify(artifact.path)
    assert found.passed
    # Engines compute in bfloat16; what is proved here is float32 on weights of bfloat16, and held to that.
    assert (
        found.tolerance == artifact.manifest.parity["tolerance"] == TOLERANCE["fp16" if precision == "fp16" else "fp32"]
    )
    for name, spec in artifact.manifest.graphs.items():
        graph = ir.load(artifact.file(spec.file))
        assert {node.domain for node in graph.graph} == {""}
        assert not [node.name for node in graph.graph if "q_num_heads" in node.attributes]
        lowered = tensorrt.lower(graph, cache_length=16 if name == "decoder" else None)
        floats = {value.dtype for value in lowered.graph.inputs} - {ir.DataType.INT64}
        wanted = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
        assert floats == ({wanted[precision]} if name == "decoder" else set())
