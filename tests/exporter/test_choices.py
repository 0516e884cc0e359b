"""Choices as Where: sums of products with a condition and its opposite, masks that start from all; and what is none."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.choices import fuse
from txopt.exporter.graph import count

INPUTS = {
    "x": "float[B,H,Q,K]",
    "y": "float[B,H,Q,K]",
    "row": "float[K]",
    "m": "bool[B,1,1,K]",
    "other": "bool[B,1,1,K]",
    "i": "int32[B,H,Q,K]",
}
SIZES = {"B": 2, "H": 3, "Q": 4, "K": 5}
CONSTANTS = {
    "fill": np.array(-1e9, np.float32),
    "few": np.array(3, np.int32),
    "all": np.array(True),
    "none": np.array(False),
    "wide": np.array([2, 3, 4, 5], np.int64),
}
KEPT, HIDDEN = "k = Cast<to=1>(m) ", "n = Not(m) h = Cast<to=1>(n) "
ALL = "s = Shape(x) e = Expand(all, s) "
WHERE = "z = Where(a, x, fill)"

# nodes that make z, and what is left of them
CHOICES: dict[str, tuple[str, dict[str, int]]] = {
    "as tf2onnx writes it": (KEPT + HIDDEN + "a = Mul(k, x) b = Mul(y, h) z = Add(a, b)", {"Where": 1}),
    "the other way round": (KEPT + HIDDEN + "a = Mul(y, h) b = Mul(x, k) z = Add(a, b)", {"Where": 1}),
    "of a number": (KEPT + HIDDEN + "a = Mul(k, x) b = Mul(fill, h) z = Add(b, a)", {"Where": 1}),
    "of shapes that broadcast": (KEPT + HIDDEN + "a = Mul(row, k) b = Mul(h, x) z = Add(a, b)", {"Where": 1}),
    "of integers": (
        "k = Cast<to=6>(m) n = Not(m) h = Cast<to=6>(n) a = Mul(k, i) b = Mul(few, h) z = Add(a, b)",
        {"Where": 1},
    ),
    "from a mask that begins with all": (ALL + f"a = And(e, m) {WHERE}", {"Where": 1}),
    "from one that ends with all": (ALL + f"a = And(m, e) {WHERE}", {"Where": 1}),
    "from one whose shape was another type's": (
        f"s = Shape(x) c = Cast<to=6>(s) d = Cast<to=7>(c) e = Expand(all, d) a = And(e, m) {WHERE}",
        {"Where": 1},
    ),
    "from one that is filled": (
        f"s = Shape(x) e = ConstantOfShape<value = bool[1] {{1}}>(s) a = And(e, m) {WHERE}",
        {"Where": 1},
    ),
    "from all and two masks": (ALL + f"c = And(e, m) a = And(c, other) {WHERE}", {"And": 1, "Where": 1}),
    "from one of which the other side is chosen": (ALL + "a = And(e, m) z = Where(a, fill, x)", {"Where": 1}),
}

OTHERS: dict[str, str] = {
    "both by one condition": KEPT + "a = Mul(k, x) b = Mul(y, k) z = Add(a, b)",
    "by another condition": KEPT + "n = Not(other) h = Cast<to=1>(n) a = Mul(k, x) b = Mul(y, h) z = Add(a, b)",
    "a difference": KEPT + HIDDEN + "a = Mul(k, x) b = Mul(y, h) z = Sub(a, b)",
    "a factor besides": "a = Mul(x, y) b = Mul(y, row) z = Add(a, b)",
    "a mask of none": f"s = Shape(x) e = Expand(none, s) a = And(e, m) {WHERE}",
    "all of another shape": f"s = Shape(y) e = Expand(all, s) a = And(e, m) {WHERE}",
    "all of a part of the shape": f"s = Shape<start=2>(x) e = Expand(all, s) a = And(e, m) {WHERE}",
    "all in a mask that others read": ALL + "c = And(e, m) a = And(c, other) w = Where(a, x, fill) z = Where(a, y, w)",
    "one or the other": ALL + f"a = Or(e, m) {WHERE}",
}


def model(nodes: str) -> ir.Model:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    header = ", ".join(f"{kind} {name}" for name, kind in INPUTS.items() if name in words)
    kind = "int32" if "i" in words else "float"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> g ({header}) => ({kind}[B,H,Q,K] z) {{ {nodes} }}'
    )
    for node in proto.graph.node:
        node.name = node.output[0]
    for name in sorted(words & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def feeds(graph: ir.Model) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    arrays = {}
    for value in graph.graph.inputs:
        kind, _, axes = INPUTS[str(value.name)].rstrip("]").partition("[")
        array = source.normal(size=[SIZES.get(axis) or int(axis) for axis in axes.split(",")]) * 4
        arrays[str(value.name)] = (
            array > 0 if kind == "bool" else array.astype(np.int32 if kind == "int32" else np.float32)
        )
    return arrays


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_becomes_where_and_says_the_same(name: str) -> None:
    nodes, left = CHOICES[name]
    before, graph = run(model(nodes), feeds(model(nodes)))[0], model(nodes)
    report = fuse(graph)
    assert (report.operator, report.fused, report.refused) == ("Where", 1, [])
    assert count(graph) == left
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_array_equal(run(graph, feeds(graph))[0], before)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_stays(name: str) -> None:
    graph = model(OTHERS[name])
    untouched = count(graph)
    report = fuse(graph)
    assert (report.fused, report.refused) == (0, [])
    assert count(graph) == untouched


def test_what_was_infinite_where_it_is_not_chosen_is_no_longer_in_the_way() -> None:
    """TensorFlow chooses; zero times infinity, which the file says instead, is no number."""
    graph = model(CHOICES["as tf2onnx writes it"][0])
    given = feeds(graph)
    given["y"] = np.full_like(given["y"], np.inf)
    assert np.isnan(run(graph, given)[0]).any()
    fuse(graph)
    np.testing.assert_array_equal(run(graph, given)[0], np.where(given["m"], given["x"], np.inf))
