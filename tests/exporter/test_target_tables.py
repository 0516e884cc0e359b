"""Lengths made plain and masks read as numbers: what is found however it is written, and what is refused."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from txopt.exporter.buffered import blocks
from txopt.exporter.graph import count
from txopt.exporter.measured import Kind, Reading, simplify
from txopt.exporter.target_tables import SelfMask, rows, self_mask
from txopt.runtime.errors import SourceError

READING = Reading(
    roles={"ids": Kind.TOKENS},
    sizes={"B": (2, 3), "L": (5, 7)},
    homes={Kind.TOKENS: {"B": ("ids", 0), "L": ("ids", 1)}},
    shapes={"ids": ("B", "L")},
)

CONSTANTS: dict[str, Any] = {
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array([2]),
    "axis0": np.array([0]),
    "axis1": np.array([1]),
    "axis2": np.array([2]),
    "axes01": np.array([0, 1]),
    "axes13": np.array([1, 3]),
    "minus": np.array([-1]),
    "far": np.array(3),
    "least": np.array(-1e30, np.float32),
    "nothing": np.array(0, np.float32),
    "table": np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32),
    "bias": np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32),
}
PLACES = "s = Shape(ids) l = Gather(s, one) places = Range(zero, l, one) k = Unsqueeze(places, axis0) q = Unsqueeze(places, axis1)"
CAUSAL = f"{PLACES} seen = LessOrEqual(k, q) m = Where(seen, nothing, least) y = Unsqueeze(m, axes01)"


def model(nodes: str, output: str = "float[b,h,q,k] y") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 24]> net (int64[batch,length] ids) => ({output}) {{ {nodes} }}'
    made = onnx.parser.parse_model(text)
    used = {name for node in made.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        made.graph.initializer.append(numpy_helper.from_array(CONSTANTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def mask(nodes: str, limit: int | None = 9) -> SelfMask:
    graph = model(nodes).graph
    return self_mask(graph, graph.outputs[0], READING, limit)


@pytest.mark.parametrize(
    "nodes",
    [
        CAUSAL,
        f"{PLACES} later = Greater(k, q) m = Where(later, least, nothing) y = Unsqueeze(m, axes01)",
        "s = Shape(ids) l = Slice(s, axis1, two) ll = Concat<axis = 0>(l, l) f = Expand(least, ll) "
        "m = Trilu<upper = 1>(f, one) y = Unsqueeze(m, axes01)",
    ],
    ids=["where", "greater", "trilu"],
)
def test_a_causal_mask_is_one_however_it_is_written(nodes: str) -> None:
    assert mask(nodes).bias is None


def test_a_bias_by_distance_becomes_a_table_that_ends_where_it_repeats_itself() -> None:
    biased = (
        f"{PLACES} d = Sub(q, k) near = Clip(d, zero, far) g = Gather(bias, near) t = Transpose<perm = [2, 0, 1]>(g) "
        "seen = LessOrEqual(k, q) m = Where(seen, t, least) y = Unsqueeze(m, axis0)"
    )
    for limit in (9, None):
        found = mask(biased, limit)
        assert found.reach == 3
        np.testing.assert_array_equal(found.bias, CONSTANTS["bias"])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            f"{PLACES} seen = Less(k, q) m = Where(seen, nothing, least) y = Unsqueeze(m, axes01)",
            "found one that is not",
        ),
        (f"{PLACES} p = Add(k, q) m = Cast<to = 1>(p) y = Unsqueeze(m, axes01)", "found one that is not"),
        (
            f"{PLACES} seen = LessOrEqual(k, q) p = Mul(k, q) f = Cast<to = 1>(p) m = Where(seen, f, least) "
            "y = Unsqueeze(m, axes01)",
            "also depends on the position",
        ),
    ],
    ids=["a token that does not see itself", "later tokens are seen", "a bias by position"],
)
def test_other_masks_are_refused(nodes: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        mask(nodes)


def test_a_bias_that_never_ends_needs_a_greatest_length() -> None:
    endless = f"{PLACES} seen = LessOrEqual(k, q) d = Sub(k, q) f = Cast<to = 1>(d) m = Where(seen, f, least) y = Unsqueeze(m, axes01)"
    assert mask(endless, 9).reach == 8
    with pytest.raises(SourceError, match="no greatest length"):
        mask(endless, None)


def test_positions_are_read_as_a_table_and_what_changes_with_the_length_is_refused() -> None:
    graph = model(f"{PLACES} p = Gather(table, places) y = Unsqueeze(p, axis0)", "float[b,q,w] y").graph
    np.testing.assert_array_equal(rows(graph, graph.outputs[0], READING, 9), CONSTANTS["table"])
    scaled = model(f"{PLACES} p = Gather(table, places) f = Cast<to = 1>(l) y = Mul(p, f)", "float[q,w] y").graph
    with pytest.raises(SourceError, match="rows that change with the length"):
        rows(scaled, scaled.outputs[0], READING, 9)
    with pytest.raises(SourceError, match="no greatest length"):
        rows(graph, graph.outputs[0], READING, None)


def test_lengths_read_off_anything_become_those_of_the_inputs() -> None:
    detour = (
        "h = Gather(table, ids) a = Abs(h) s = Shape(a) b = Gather(s, zero) l = Gather(s, one) b1 = Unsqueeze(b, axis0) "
        "l1 = Unsqueeze(l, axis0) f = Mul(b1, two) c = Concat<axis = 0>(f, l1, minus) y = Reshape(h, c)"
    )
    net = model(detour, "float[b,l,w] y")
    simplify(net, READING)
    assert count(net) == {"Concat": 1, "Gather": 1, "Mul": 1, "Reshape": 1, "Shape": 1}
    (reshape,) = [node for node in net.graph if node.op_type == "Reshape"]
    concat = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    assert concat is not None
    tail = [
        value.const_value.numpy().tolist() for value in concat.inputs[1:] if value is not None and value.const_value
    ]
    assert tail == [[-1], [2]], "2B rows, as many tokens as are left, and half of the width"


def test_a_length_that_is_no_multiple_of_the_inputs_is_refused() -> None:
    net = model("h = Gather(table, ids) s = Shape(ids) o = Add(s, one) y = Expand(h, o)", "float[b,l,w] y")
    net.graph.outputs[0].shape = None
    with pytest.raises(SourceError, match=r"\(Expand\) takes the length o, which is no multiple"):
        simplify(net, READING)


def test_positions_counted_from_the_tokens_are_refused() -> None:
    net = model("c = CumSum(ids, one) h = Gather(table, c) y = Softmax(h)", "float[b,l,w] y")
    with pytest.raises(SourceError) as refusal:
        blocks(net.graph, READING)
    for part in ("counts positions from all tokens", "part of no attention", "found 0 and 0"):
        assert part in str(refusal.value)
