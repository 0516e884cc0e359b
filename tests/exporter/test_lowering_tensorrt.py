"""What becomes of graphs on their way to TensorRT: they say the same, and a decoder says what a search reads of it."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.calibration.graphs import engine, parsed
from tests.exporter.engine_feeds import FAMILIES, SIZES, feeds
from txopt.benchmarks.engine_graphs import PRECISIONS, graphs
from txopt.calibration.halves import spell_out
from txopt.exporter.lowering import ort, ort_cuda, tensorrt
from txopt.exporter.lowering.choice import MOST
from txopt.exporter.lowering.static import lower_static
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.parity import TOLERANCE

LENGTH = SIZES["S"]
_CHOICE = ("next", "top_values", "top_ids", "log_sum")


def outputs_of(model: ir.Model, twin: ir.Model | None = None) -> dict[str, np.ndarray]:
    """What ONNX Runtime says, every node as it is written, to the feeds of ``twin``."""
    given = feeds(twin or model)
    names = [str(value.name) for value in model.graph.outputs]
    asked = {str(value.name): value.dtype for value in model.graph.inputs}
    cast = {name: array.astype(asked[name].numpy()) for name, array in given.items()}  # type: ignore[union-attr]
    return dict(zip(names, map(np.asarray, engine(model, as_written=True, **cast)), strict=True))


def lowered(model: ir.Model, name: str) -> ir.Model:
    return tensorrt.lower(model, cache_length=LENGTH if name == "decoder" else None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_graphs_say_what_the_neutral_ones_say(
    family: str, precision: str, artifacts: Callable[[str], Artifact]
) -> None:
    for name, model in graphs(artifacts(family), precision).items():
        low = lowered(model, name)
        onnx.checker.check_model(ir.to_proto(low), full_check=True)
        before = outputs_of(model)
        if precision == "bf16":  # no engine here runs it: float32 between Casts to it says what it means
            spell_out(low, ir.DataType.BFLOAT16)
            as_floats(low)
        after = outputs_of(low, model)
        assert after.keys() - before.keys() == (set(_CHOICE) if name == "decoder" else set())
        for output, expected in before.items():
            allowed = TOLERANCE[precision] if precision == "bf16" else 1e-6
            scale = max(1.0, float(np.abs(expected.astype(np.float32)).max()))
            error = np.abs(after[output].astype(np.float32) - expected.astype(np.float32)).max()
            assert error <= allowed * scale, (name, output)


def as_floats(model: ir.Model) -> None:
    """Inputs and outputs of bfloat16 become float32, with Casts inside: tests feed and read numpy's types."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.dtype == ir.DataType.BFLOAT16]:
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.BFLOAT16}, name=f"{value.name}/narrow")
        cast.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(next(iter(graph)), cast)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            name = value.name
            value.name = f"{name}/narrow"
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/whole")
            cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def lowered_for_cuda(model: ir.Model, name: str) -> ir.Model:
    copy = model.clone()
    ort_cuda.lower(copy, "fp32")
    return copy


@pytest.mark.parametrize("lower", [lowered, lowered_for_cuda])
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_a_decoder_gives_what_a_search_reads(
    family: str, lower: Callable[[ir.Model, str], ir.Model], artifacts: Callable[[str], Artifact]
) -> None:
    said = outputs_of(lower(graphs(artifacts(family), "fp32")["decoder"], "decoder"))
    last = said["logits"][:, -1].astype(np.float64)
    most = min(MOST, last.shape[1])
    np.testing.assert_array_equal(said["next"], last.argmax(1))
    np.testing.assert_array_equal(said["top_values"], -np.sort(-last, axis=1)[:, :most])
    np.testing.assert_array_equal(np.take_along_axis(last, said["top_ids"], 1), said["top_values"])
    np.testing.assert_allclose(said["log_sum"], np.log(np.exp(last).sum(1)), rtol=1e-5)


def test_no_more_are_chosen_than_a_large_vocabulary_needs() -> None:
    model = parsed("(float[R,Q,500] x) => (float[R,Q,500] logits) { logits = Neg(x) }")
    low = tensorrt.lower(model, cache_length=8)
    assert [str(value.shape) for value in low.graph.outputs] == [
        "[R,Q,500]",
        "[R]",
        f"[R,{MOST}]",
        f"[R,{MOST}]",
        "[R]",
    ]


def test_what_chooses_already_for_cuda_chooses_once(artifacts: Callable[[str], Artifact]) -> None:
    model = graphs(artifacts("t5"), "fp32")["decoder"]
    twice = lowered(lowered_for_cuda(model, "decoder"), "decoder")
    names = [value.name for value in twice.graph.outputs]
    assert [name for name in names if name in _CHOICE] == list(_CHOICE)
    ort_cuda.lower(twice, "fp32")
    assert [value.name for value in twice.graph.outputs] == names
    encoder = lowered_for_cuda(graphs(artifacts("t5"), "fp32")["encoder"], "encoder")
    assert not any(value.name in _CHOICE for value in encoder.graph.outputs)


def test_the_model_given_is_left_alone(artifacts: Callable[[str], Artifact]) -> None:
    model = graphs(artifacts("t5"), "bf16")["decoder"]
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lowered(model, "decoder")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_bfloat16_is_computed_in_with_its_weights_and_caches(artifacts: Callable[[str], Artifact]) -> None:
    low = lowered(graphs(artifacts("t5"), "bf16")["decoder"], "decoder")
    types = {str(value.name): value.dtype for value in (*low.graph.inputs, *low.graph.outputs)}
    assert {types[f"self_key.{layer}"] for layer in (0, 1)} == {ir.DataType.BFLOAT16}
    assert types["logits"] == types["top_values"] == types["log_sum"] == ir.DataType.FLOAT
    weights = {
        v.dtype for v in low.graph.initializers.values() if v.const_value is not None and v.const_value.size > 999
    }
    assert weights == {ir.DataType.BFLOAT16}
    casts = [node for node in low.graph if node.op_type == "Cast" and ir.DataType.BFLOAT16 in (node.inputs[0].dtype,)]  # type: ignore[union-attr]
    assert [str(node.outputs[0].name) for node in casts] == ["logits"]


def test_the_cache_has_its_length_everywhere(artifacts: Callable[[str], Artifact]) -> None:
    low = lowered(graphs(artifacts("bart"), "fp32")["decoder"], "decoder")
    values = [*low.graph.inputs, *low.graph.outputs, *(out for node in low.graph for out in node.outputs)]
    assert not [value.name for value in values if value.shape is not None and "S" in map(str, value.shape)]
    assert str(low.graph.inputs[3].shape) == f"[R,4,{LENGTH},16]"


def test_what_was_lowered_for_onnx_runtime_is_refused_with_its_nodes(artifacts: Callable[[str], Artifact]) -> None:
    model = graphs(artifacts("t5"), "int4")["encoder"]
    ort.lower_for_cpu(model, "int4")
    with pytest.raises(
        UsageError, match=r"com\.microsoft MatMulNBits is no standard operator(?s:.*)and \d+ more"
    ) as heard:
        tensorrt.lower(model)
    assert "--target tensorrt" in str(heard.value)


def test_unsigned_codes_are_refused(artifacts: Callable[[str], Artifact]) -> None:
    model = graphs(artifacts("t5"), "int8")["encoder"]
    lower_static(model)
    with pytest.raises(UsageError, match="codes of uint8; TensorRT takes signed ones"):
        tensorrt.lower(model)


@pytest.mark.parametrize(
    ("attributes", "inputs", "message"),
    [
        ("softcap=2.0", "q, q, q", "softcap"),
        ("is_causal=1", "q, q, q, m", "a mask and is_causal"),
        ("softmax_precision=1", "q, q, q", "softmax_precision"),
        ("scale=1.0", "q, q, q, m, q, q", "a cache of its own"),
        ("scale=1.0", 'q, q, q, m, "", "", n', "lengths of keys instead of a mask"),
    ],
)
def test_what_tensorrt_drops_of_attention_is_refused(attributes: str, inputs: str, message: str) -> None:
    model = parsed(
        "(float[B,2,Q,8] q, bool[Q,Q] m, int64[B] n) => (float[B,2,Q,8] y) { y = Attention <"
        + attributes
        + f"> ({inputs}) }}"
    )
    with pytest.raises(UsageError, match=f"Attention with {message}; TensorRT does not take it"):
        tensorrt.lower(model)
