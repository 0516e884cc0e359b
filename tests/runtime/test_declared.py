"""What the format allows an encoder to take and to give, and no exporter of ours makes: read and run all the same."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from tests.runtime.artifacts import manifest, tensor
from txopt.runtime.errors import InputError
from txopt.runtime.graphs import CacheSpec, GraphSpec, TensorSpec, format_needed
from txopt.runtime.model import Model
from txopt.runtime.writer import ArtifactWriter

# Frames are four samples each, heard where one of these is not 0; the decoder counts the frames that it is told are heard.
FRAMES = """
<ir_version: 10, opset_import: ["" : 24]>
encoder (float[B,N] input_values)
    => (float[B,T,4] memory, float[B,1,T,4] cross_key_0, float[B,1,T,4] cross_value_0, int64[B,T] encoder_attention_mask)
    <int64[3] cut = {0, -1, 4}, int64[1] one = {1}, int64[1] last = {-1}>
{
    memory = Reshape(input_values, cut)
    cross_key_0 = Unsqueeze(memory, one)
    cross_value_0 = Identity(cross_key_0)
    size = Abs(memory)
    largest = ReduceMax<keepdims=0>(size, last)
    sign = Sign(largest)
    encoder_attention_mask = Cast<to=7>(sign)
}
"""
COUNTING = """
<ir_version: 10, opset_import: ["" : 24]>
decoder (int64[R,Q] input_ids, int64[R] position, int64[B,T] encoder_attention_mask,
         float[R,1,S,4] self_key_0, float[R,1,S,4] self_value_0, float[B,1,T,4] cross_key_0, float[B,1,T,4] cross_value_0)
    => (float[R,Q,3] logits, float[R,1,S,4] present_key_0, float[R,1,S,4] present_value_0)
    <int64[1] one = {1}, int64[1] three = {3}, int64[1] two = {2}>
{
    heard = ReduceSum(encoder_attention_mask, one)
    wide = Cast<to=1>(heard)
    each = Unsqueeze(wide, two)
    tokens = Shape(input_ids)
    shape = Concat<axis=0>(tokens, three)
    logits = Expand(each, shape)
    present_key_0 = Identity(self_key_0)
    present_value_0 = Identity(self_value_0)
}
"""
TAKES = """
<ir_version: 10, opset_import: ["" : 24]>
encoder (bfloat16[B,T,4] states, bool[B,T] flags) => (float[B,T,4] memory)
    <int64[1] last = {-1}>
{
    wide = Cast<to=1>(states)
    given = Unsqueeze(flags, last)
    seen = Cast<to=1>(given)
    memory = Mul(wide, seen)
}
"""


def parsed(text: str) -> onnx.ModelProto:
    """The parser's names hold no dots: "cross_key_0" is "cross_key.0"."""
    model = parser.parse_model(text)
    for item in (*model.graph.input, *model.graph.output):
        item.name = item.name.replace("_0", ".0")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("_0", ".0") for name in names]
    return model


def opened(out: Path, files: Mapping[str, str], graphs: Mapping[str, GraphSpec], **facts: Any) -> Model:
    with ArtifactWriter(out) as writer:
        for name, text in files.items():
            onnx.save(parsed(text), writer.directory / name)
        (writer.directory / "parity.safetensors").write_bytes(b"cases")
        said = replace(
            manifest(), graphs=dict(graphs), format=format_needed(graphs), frontend={"type": "arrays"}, **facts
        )
        return Model(writer.commit(said), threads=1)


def graph(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GraphSpec:
    return GraphSpec(file=name, inputs=tuple(inputs), outputs=tuple(outputs))


def test_an_encoder_may_make_the_mask_of_its_frames_without_taking_one(tmp_path: Path) -> None:
    cache = CacheSpec(layers=1, heads=1, head_size=4, dtype="float32", max_length=64)
    cross = [tensor(f"cross_{part}.0", "float32", "B", 1, "T", 4) for part in ("key", "value")]
    mask = tensor("encoder_attention_mask", "int64", "B", "T")
    encoder = graph(
        "encoder.onnx",
        [tensor("input_values", "float32", "B", "N")],
        [tensor("memory", "float32", "B", "T", 4), *cross, mask],
    )
    ids, position = tensor("input_ids", "int64", "R", "Q"), tensor("position", "int64", "R")
    decoder = graph(
        "decoder.onnx",
        [ids, position, mask, *cache.tensors("self"), *cross],
        [tensor("logits", "float32", "R", "Q", 3), *cache.tensors("present")],
    )
    files = {"encoder.onnx": FRAMES, "decoder.onnx": COUNTING}
    model = opened(tmp_path / "out", files, {"encoder": encoder, "decoder": decoder}, cache=cache)
    sound = np.ones((2, 12), np.float32)
    sound[1, 4:] = 0
    logits = model.decode(model.encode(input_values=sound)).prefill(np.array([[1], [1]]))
    np.testing.assert_array_equal(logits, [[3] * 3, [1] * 3])


@pytest.fixture
def taking(tmp_path: Path) -> Model:
    inputs = [tensor("states", "bfloat16", "B", "T", 4), tensor("flags", "bool", "B", "T")]
    spec = graph("encoder.onnx", inputs, [tensor("memory", "float32", "B", "T", 4)])
    facts: dict[str, Any] = {"kind": "encoder", "task": "embedding", "cache": None}
    return opened(tmp_path / "out", {"encoder.onnx": TAKES}, {"encoder": spec}, **facts)


def test_bfloat16_and_booleans_are_fed_as_such(taking: Model) -> None:
    """To the nearest number that bfloat16 has, of two equally near ones the even one."""
    numbers = np.array([[[1, 1 + 1 / 256, 1 + 3 / 256, -1e-3]]], np.float32)
    nearest = np.array([[[1, 1, 1 + 4 / 256, -0.00099945068359375]]], np.float32)
    got = taking.encode(states=numbers, flags=[[True]]).values["memory"]
    np.testing.assert_array_equal(taking.session.array(got), nearest)
    got = taking.encode(states=numbers, flags=[[False]]).values["memory"]
    np.testing.assert_array_equal(taking.session.array(got), np.zeros((1, 1, 4)))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"states": np.ones((1, 1, 4)), "flags": [[0.5]]}, r"flags: expected bool \[B,T\], got float64"),
        ({"states": np.ones((1, 1, 4)), "flags": [[2]]}, r"flags: expected bool \[B,T\], got int64"),
        (
            {"states": np.full((1, 1, 4), 3.4e38), "flags": [[True]]},
            "states: expected finite numbers that bfloat16 holds",
        ),
        ({"states": [[[1, 2, 3, 4]]], "flags": [[True]]}, r"states: expected bfloat16 \[B,T,4\], got int64"),
    ],
)
def test_what_these_inputs_cannot_be_is_said(inputs: dict[str, Any], said: str, taking: Model) -> None:
    with pytest.raises(InputError, match=said):
        taking.encode(**inputs)
