"""Files read without their weights: the same model, whose weights are found in the file itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from txopt.exporter import description, onnx_file
from txopt.exporter.onnx_weights import LARGE, skeleton

WEIGHT = np.arange(LARGE // 4, dtype=np.float32)
SMALL = np.arange(8, dtype=np.float32)


def model() -> onnx.ModelProto:
    """Weights as initializers, as a constant, and in the branch of an If."""
    weight, inner = numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(WEIGHT + 1, "inner")
    branch = helper.make_graph([helper.make_node("Identity", ["inner"], ["i"])], "b", [], [_value("i")], [inner])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(WEIGHT + 2, "c")),
        helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("Sum", ["w", "c", "i"], ["y"]),
    ]
    yes, small = numpy_helper.from_array(np.array(True), "yes"), numpy_helper.from_array(SMALL, "small")
    graph = helper.make_graph(nodes, "g", [], [_value("y")], [weight, yes, small])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="someone")


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(WEIGHT)])


def test_the_weights_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    content = skeleton(path)
    assert len(content) < 2000
    found = onnx.load_from_string(content)
    assert numpy_helper.to_array(found.graph.initializer[2]).tolist() == SMALL.tolist()
    onnx.external_data_helper.load_external_data_for_model(found, str(tmp_path))
    for tensor in onnx.external_data_helper._get_all_tensors(found):
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert found == model()


def test_a_small_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = helper.make_model(helper.make_graph([helper.make_node("Neg", ["y"], ["z"])], "g", [], []))
    onnx.save(proto, path)
    assert skeleton(path) == path.read_bytes()


@pytest.mark.parametrize("left", [LARGE, LARGE + 100, 2 * LARGE + 5])
def test_a_file_that_ends_early_is_no_message(tmp_path: Path, left: int) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString()[:left])
    with pytest.raises(ValueError, match="ends behind its message"):
        skeleton(path)


@pytest.mark.parametrize("noise", [b"\xff" * LARGE, b"\x0b" * LARGE, bytes(LARGE)])
def test_noise_is_no_message(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(noise)
    try:
        content = skeleton(path)
    except ValueError:
        return
    assert content == noise, "a message of fields that nobody knows is left to the parser"


def test_large_constants_of_nodes_are_found_after_their_opset_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = model()
    proto.opset_import[0].version = 13
    onnx.save(proto, path)
    loaded = onnx_file.load(path)
    onnx_file.convert(loaded, path)
    constants = [node.attributes["value"].as_tensor() for node in loaded.graph if node.op_type == "Constant"]
    assert [tensor.numpy().tolist() for tensor in constants] == [(WEIGHT + 2).tolist()]


def test_no_other_file_is_named_for_them(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    document = description.of_file(onnx_file.parse(path), path)
    assert (document["external_data"], document["bytes"]) == ([], path.stat().st_size)
