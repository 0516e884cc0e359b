"""Graphs by layers: which nodes and weights belong to which, before and after fusions, and what odd files claim."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from txopt.exporter import description, structure
from txopt.exporter.structure import AFTER, ALL, BEFORE, BETWEEN

F32 = np.dtype(np.float32)


def graph(nodes: list[Any], weights: dict[str, np.ndarray[Any, Any]] | None = None) -> onnx.ModelProto:
    """Nodes are (operator, inputs, output, name); x is the input, the last output is the graph's."""
    made = [helper.make_node(operator, inputs, [output], name=name) for operator, inputs, output, name in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, ["n", 4])
    held = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    return helper.make_model(helper.make_graph(made, "net", [x], [y], held))


def picture(proto: onnx.ModelProto) -> list[tuple[str, str]]:
    rows = structure.rows(structure.of_proto(proto))
    return [(row["layer"], " ".join(operator for operator, _ in row["operators"])) for row in rows]


def square(value: float = 1.0) -> np.ndarray[Any, Any]:
    return np.full((4, 4), value, F32)


TWO_STACKS = [
    ("Neg", ["x"], "a", "/embed/Neg"),
    ("Add", ["a", "a"], "b", "/encoder/layers.0/Add"),
    ("Relu", ["b"], "c", "/encoder/layers.1/Relu"),
    ("Abs", ["c"], "d", "/encoder/norm/Abs"),
    ("Mul", ["d", "d"], "e", "/decoder/layers.0/Mul"),
    ("Sqrt", ["e"], "y", "/lm_head/Sqrt"),
]


def test_what_is_in_no_layer_is_told_apart_by_where_it_is() -> None:
    assert picture(graph(TWO_STACKS)) == [
        (BEFORE, "Neg"),
        ("encoder.0", "Add"),
        ("encoder.1", "Relu"),
        (BETWEEN, "Abs"),
        ("decoder.0", "Mul"),
        (AFTER, "Sqrt"),
    ]


def test_a_graph_whose_names_tell_nothing_is_one_row() -> None:
    assert picture(graph([("Neg", ["x"], "a", ""), ("Abs", ["a"], "y", "")])) == [(ALL, "Neg Abs")]


def test_layers_are_in_the_order_of_their_numbers_wherever_bookkeeping_puts_them() -> None:
    nodes = [
        ("Identity", ["w"], "i", "/encoder/layers.10/Identity"),
        ("MatMul", ["x", "w"], "a", "/encoder/layers.2/MatMul"),
        ("MatMul", ["a", "i"], "y", "/encoder/layers.10/MatMul"),
    ]
    assert [name for name, _ in picture(graph(nodes, {"w": square()}))] == ["encoder.2", "encoder.10"]


def test_bookkeeping_does_not_say_where_the_layers_begin() -> None:
    nodes = [
        ("Identity", ["x"], "i", "/encoder/layers.0/Identity"),
        ("Neg", ["x"], "a", "/embed/Neg"),
        ("Add", ["a", "i"], "y", "/encoder/layers.0/Add"),
    ]
    assert picture(graph(nodes)) == [(BEFORE, "Neg"), ("encoder.0", "Identity Add")]
    later = [
        ("Identity", ["x"], "j", "/decoder/layers.0/Identity"),
        *nodes,
        ("Abs", ["y"], "z", "/decoder/layers.0/Abs"),
    ]
    assert [name for name, _ in picture(graph(later))] == [BEFORE, "encoder.0", "decoder.0"]


def test_a_node_without_a_telling_name_is_where_its_weight_is_else_where_the_node_before_it_is() -> None:
    nodes = [
        ("Neg", ["x"], "a", "Neg_0"),
        ("MatMul", ["a", "encoder.layer.0.fc.weight"], "b", "node_MatMul_1"),
        ("Relu", ["b"], "c", "node_relu"),
        ("MatMul", ["c", "encoder.layer.1.fc.weight"], "y", ""),
    ]
    weights = {"encoder.layer.0.fc.weight": square(), "encoder.layer.1.fc.weight": square(2)}
    assert picture(graph(nodes, weights)) == [(BEFORE, "Neg"), ("encoder.0", "MatMul Relu"), ("encoder.1", "MatMul")]


def test_the_scopes_that_torch_writes_tell_the_layer() -> None:
    proto = graph([("Relu", ["x"], "y", "node_relu_1")])
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'bert', 'bert.encoder.layer.3', 'relu_1']"
    assert picture(proto) == [("bert.encoder.3", "Relu")]
    entry.value = "['', 'bert"  # damaged
    assert picture(proto) == [(ALL, "Relu")]


def test_a_weight_without_a_telling_name_belongs_to_its_first_reader() -> None:
    nodes = [
        ("MatMul", ["x", "onnx::MatMul_7"], "a", "/encoder/layers.0/fc1/MatMul"),
        ("MatMul", ["a", "onnx::MatMul_7"], "y", "/encoder/layers.1/fc1/MatMul"),
    ]
    found = structure.layers([structure.of_proto(graph(nodes, {"onnx::MatMul_7": square()}))])
    assert [layer.to_json() for layer in found] == [
        {"name": "encoder.0", "nodes": 1, "parameters": 16, "bytes": 64},
        {"name": "encoder.1", "nodes": 1, "parameters": 0, "bytes": 0},
    ]
    assert structure.weights(found)["groups"] == [{"name": "encoder.*.fc1", "weights": 1, "bytes": 64}]


def test_two_graphs_that_share_one_tensor_of_a_file_hold_it_once() -> None:
    nodes = [("MatMul", ["x", "table"], "y", "/lm_head/MatMul")]
    protos = [graph(nodes, {"table": square()}) for _ in range(2)]
    inline = structure.layers(map(structure.of_proto, protos))
    assert inline[0].to_json()["bytes"] == 128
    for proto in protos:
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.data"), ("offset", "0"), ("length", "64")):
            tensor.external_data.add(key=key, value=value)
    shared = structure.layers(map(structure.of_proto, protos))
    assert [layer.to_json() for layer in shared] == [{"name": None, "nodes": 2, "parameters": 16, "bytes": 64}]


def test_nodes_inside_branches_are_in_the_picture() -> None:
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"], name="/decoder/layers.0/Relu")],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])],
    )
    proto = graph([("Neg", ["x"], "y", "/Neg")])
    branch = helper.make_node("If", ["c"], ["y2"], name="/If", then_branch=inner, else_branch=inner)
    proto.graph.node.append(branch)
    assert picture(proto) == [(BEFORE, "Neg If"), ("decoder.0", "Relu Relu")]


def test_what_was_fused_is_where_that_was_which_it_replaced() -> None:
    proto = graph(
        [
            ("MatMul", ["x", "encoder.layer.0.weight"], "a", "node_matmul"),
            ("Softmax", ["a"], "b", "node_softmax"),
            ("MatMul", ["b", "encoder.layer.1.weight"], "c", "node_matmul_1"),
            ("Softmax", ["c"], "y", "node_softmax_1"),
        ],
        {"encoder.layer.0.weight": square(), "encoder.layer.1.weight": square(2)},
    )
    model = ir.from_proto(proto)
    first = next(node for node in model.graph if node.name == "node_matmul_1")
    first.name = "node_softmax_1/QKV"  # in layer 1, though the node before it is in layer 0 and no weight tells more
    first.replace_input_with(1, model.graph.inputs[0])
    rows = description.picture(proto, model)["graphs"][""]["after"]
    assert [(row["layer"], [name for _, name in row["operators"]]) for row in rows] == [
        ("encoder.0", ["node_matmul", "node_softmax"]),
        ("encoder.1", ["node_softmax_1/QKV", "node_softmax_1"]),
    ]


def test_the_claims_of_a_file_are_bounded() -> None:
    nodes = [("Neg", ["x"], f"v{index}", "n" * 1000) for index in range(1500)]
    proto = graph(nodes, {"w" * 1000: square()})
    proto.graph.initializer[0].dims[:] = [2**62] * 20
    proto.graph.initializer.add(name="text", data_type=TensorProto.STRING, dims=[2])
    proto.graph.initializer.add(name="unknown", data_type=9999, dims=[-2])
    found = description.picture(proto, None)
    (row,) = found["graphs"][""]["before"]
    assert (row["nodes"], len(row["operators"]), len(row["operators"][0][1])) == (1500, 1000, 200)
    assert found["layers"][0]["bytes"] == 2**63 - 1
    assert len(found["weights"]["largest"][0]["name"]) == 200


def test_of_very_many_layers_the_last_are_counted_only() -> None:
    nodes = [("Neg", ["x"], f"v{index}", f"/decoder/layers.{index}/Neg") for index in range(1000)]
    found = structure.rows(structure.of_proto(graph(nodes)))
    assert (len(found), found[-2]["layer"], found[-1]["layer"]) == (401, "decoder.399", "600 more rows")
    assert sum(row["nodes"] for row in found) == 1000


def test_the_document_of_a_file_lists_its_layers(tmp_path: Path) -> None:
    onnx.save(graph(TWO_STACKS), tmp_path / "net.onnx")
    document = description.of_file(onnx.load(tmp_path / "net.onnx"), tmp_path / "net.onnx")
    assert [(layer["name"], layer["nodes"]) for layer in document["layers"]] == [
        ("encoder.0", 1),
        ("encoder.1", 1),
        ("decoder.0", 1),
        (None, 3),
    ]
