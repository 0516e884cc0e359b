"""Every family: exported, verified, fused as promised, and saying what transformers says for the same options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.exporter.models import BUILDERS
from txopt.exporter import pretrained
from txopt.runtime.artifact import Artifact
from txopt.runtime.graphs import AXES
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

TEXT = ("t5", "t5-gated", "mt5", "bart", "mbart", "mvp", "marian", "pegasus", "m2m_100", "fsmt", "prophetnet", "led")
RELATIVES = ("umt5", "plbart", "blenderbot", "blenderbot-small")
DECODERS = (*TEXT, *RELATIVES, "whisper", "trocr", "speecht5")
Artifacts = Callable[[str], Artifact]
Make = Callable[[str], Path]

OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 1, "suppress_tokens": [7, 11], "min_new_tokens": 4},
    {"num_beams": 4, "length_penalty": 0.6},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 2, "forced_bos_token_id": 5, "forced_eos_token_id": 2},
)


@pytest.mark.parametrize("name", BUILDERS)
def test_export_is_verified_and_verify_repeats_it(name: str, artifacts: Artifacts) -> None:
    artifact = artifacts(name)
    assert artifact.manifest.parity["passed"]
    report = verify(artifact.path)
    assert report.passed
    assert not report.near_ties


@pytest.mark.parametrize("name", DECODERS)
def test_one_attention_a_block_and_one_scatter_a_buffer(name: str, artifacts: Artifacts) -> None:
    nodes = artifacts(name).manifest.fusion["decoder"]["nodes"]
    streams = 2 if name == "prophetnet" else 1
    assert nodes["Attention"] == 2 * (streams + 1), "two layers of self-attention, in every stream, and cross-attention"
    assert nodes["TensorScatter"] == 4
    assert "Softmax" not in nodes
    assert "If" not in nodes


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "umt5"])
def test_decomposed_norms_leave_as_rms_normalization(name: str, artifacts: Artifacts) -> None:
    fusion = artifacts(name).manifest.fusion
    assert fusion["encoder"]["nodes"]["RMSNormalization"] == 5
    assert fusion["decoder"]["nodes"]["RMSNormalization"] == 7
    assert "ReduceMean" not in fusion["decoder"]["nodes"]


@pytest.mark.parametrize("name", DECODERS)
def test_every_weight_once(name: str, artifacts: Artifacts, checkpoints: Make) -> None:
    source = sum(file.stat().st_size for file in checkpoints(name).glob("*.safetensors"))
    data = artifacts(name).file("weights.data").stat().st_size
    # Tiny weights are padded to pages of the file; real ones are many pages each (benchmarks/main_road.py has the real ratio).
    tensors = len(onnx.load(artifacts(name).file("decoder.onnx"), load_external_data=False).graph.initializer)
    assert data <= source + 2 * 4096 * tensors


@pytest.mark.parametrize("name", BUILDERS)
def test_graphs_are_valid_and_axes_share_their_names(name: str, artifacts: Artifacts) -> None:
    for spec in artifacts(name).manifest.graphs.values():
        path = artifacts(name).file(spec.file)
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        for tensor in (*graph.input, *graph.output):
            for dim in tensor.type.tensor_type.shape.dim:
                assert dim.HasField("dim_value") or dim.dim_param in AXES, (
                    f"{tensor.name} has an axis {dim.dim_param!r}"
                )
        assert {entry.domain for entry in onnx.load(path, load_external_data=False).opset_import} == {""}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
@pytest.mark.parametrize("name", ["t5", "bart", "marian", "m2m_100", "fsmt", "prophetnet", "led"])
def test_ids_are_those_of_transformers(
    name: str, options: dict[str, Any], artifacts: Artifacts, checkpoints: Make
) -> None:
    inputs = _padded(np.random.default_rng(5), 3, 6)
    source = pretrained.load(checkpoints(name), torch.float32)
    common = {"max_new_tokens": 15, "do_sample": False, **options}
    expected = source.generate({key: torch.from_numpy(value) for key, value in inputs.items()}, **common)
    got = Model(artifacts(name)).generate(**inputs, **common)
    assert expected is not None
    np.testing.assert_array_equal(got.sequences, expected.ids.numpy())


def test_decoder_alone_takes_prompts_padded_on_the_left(artifacts: Artifacts, checkpoints: Make) -> None:
    inputs = _padded(np.random.default_rng(6), 3, 6)
    inputs = {key: np.ascontiguousarray(value[:, ::-1]) for key, value in inputs.items()}
    source = pretrained.load(checkpoints("gpt2"), torch.float32)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        common: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
        expected = source.generate({key: torch.from_numpy(value) for key, value in inputs.items()}, **common)
        assert expected is not None
        np.testing.assert_array_equal(
            Model(artifacts("gpt2")).generate(**inputs, **common).sequences, expected.ids.numpy()
        )


def test_rows_may_stand_at_different_positions(artifacts: Artifacts) -> None:
    """Two rows that start 3 tokens apart say the same as each alone."""
    model = Model(artifacts("bart"))
    inputs = _padded(np.random.default_rng(7), 2, 5)
    tokens = np.random.default_rng(8).integers(5, 90, (2, 6))
    together = model.decode(model.encode(**inputs))
    mask = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logits = together.prefill(tokens, mask)
    for row, start in ((0, 3), (1, 0)):
        alone = model.decode(model.encode(**{key: value[row : row + 1] for key, value in inputs.items()}))
        np.testing.assert_allclose(logits[row], alone.prefill(tokens[row : row + 1, start:])[0], atol=1e-5)


def _padded(generator: np.random.Generator, rows: int, length: int) -> dict[str, Any]:
    mask = (np.arange(length) < np.linspace(length, 2, rows).round()[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask == 1, generator.integers(5, 90, mask.shape), 1), "attention_mask": mask}
