"""Keys and values repeated for groups of heads: Attention takes the few, or the repeated ones stay with a reason."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.groups import fuse
from txopt.exporter.fusion.proof import prove
from txopt.exporter.graph import count

RANDOM = np.random.default_rng(0)
FEEDS = {
    "q": RANDOM.normal(size=(2, 6, 3, 8)).astype(np.float32),
    "k": RANDOM.normal(size=(2, 2, 5, 8)).astype(np.float32),
    "v": RANDOM.normal(size=(2, 2, 5, 8)).astype(np.float32),
    "mask": np.tril(np.ones((3, 5), np.bool_), 2),
}
CONSTANTS = {
    "two": [2],
    "three": [3],
    "minus_three": [-3],
    "minus": -1,
    "times": [1, 1, 3, 1, 1],
    "longer": [1, 1, 3, 2, 1],
    "other": [1, 3, 1, 1, 1],
    "in_turn": [1, 3, 1, 1],
    "kept": [-1, 2, 3, -1, 8],
    "joined": [0, 6, -1, 8],
    "few": [0, 2, -1, 8],
    "narrower": [0, 12, -1, 4],
    "open": [-1],
    "one": [1],
    "six": [6],
    "eight": [8],
    "first": 0,
}

ATTENTION = "y = Attention<scale = 0.25>(q, kk, vv, mask)"
SIZES = "b = Shape<end = 1>(k) s = Shape<start = 2, end = 3>(k) "
ASKED = SIZES + "five = Concat<axis = 0>(b, two, three, s, eight) four = Concat<axis = 0>(b, six, s, eight) "
BY_EXPAND = "{x}u = Unsqueeze({x}, two) {x}e = Expand({x}u, {to}) {x}{x} = Reshape({x}e, {joined}) "
BY_TILE = BY_EXPAND.replace("Expand", "Tile")


def both(template: str, to: str = "times", joined: str = "joined") -> str:
    return "".join(template.format(x=x, to=to, joined=joined) for x in "kv")


# nodes that lead to K and V of an Attention
SPELLINGS: dict[str, str] = {
    "by how many times": both(BY_EXPAND),
    "by tiles": both(BY_TILE),
    "from the end": both(BY_EXPAND.replace("{x}, two", "{x}, minus_three")),
    "to lengths that are asked for": ASKED + both(BY_EXPAND, "five", "four"),
    "heads left open": SIZES + "four = Concat<axis = 0>(b, open, s, eight) " + both(BY_EXPAND, joined="four"),
    "by torch's expand(-1)": "n = Constant<value_ints = [5]>() ones = ConstantOfShape<value = int64[1] {1}>(n) "
    "asked = Mul(ones, minus) e = Equal(kept, asked) to = Where(e, ones, kept) " + both(BY_EXPAND, "to"),
    "with a mask that asks K for its length": both(BY_EXPAND)
    + "l = Shape<start = 2, end = 3>(q) n = Shape<start = 2, end = 3>(kk) m = Concat<axis = 0>(l, n) "
    "seen = Expand(mask, m) y = Attention<scale = 0.25>(q, kk, vv, seen)",
    "with a mask that asks what is repeated for K's length": both(BY_TILE)
    + "l = Shape<start = 2, end = 3>(q) n = Shape<start = -2, end = 4>(ke) m = Concat<axis = 0>(l, n) "
    "seen = Expand(mask, m) y = Attention<scale = 0.25>(q, kk, vv, seen)",
    "apart, and not repeated": both("{x}u = Unsqueeze({x}, two) {x}{x} = Reshape({x}u, few) "),
}

NEAR_MISSES: dict[str, tuple[str, list[str]]] = {
    "all heads in turn": (
        "kk = Tile(k, in_turn) vv = Tile(v, in_turn) " + ATTENTION,
        ["g/2: g/0 repeats all heads one after the other, the operator each by itself"],
    ),
    "K alone": (
        BY_EXPAND.format(x="k", to="times", joined="joined") + "vv = Concat<axis = 1>(v, v, v) " + ATTENTION,
        ["g/4: heads of K are repeated 3 times, those of V 1 times"],
    ),
    "repeated before the heads": (
        both(BY_EXPAND.replace("{x}, two", "{x}, one"), "other") + ATTENTION,
        [],
    ),
    "heads joined with sizes": (
        both(BY_EXPAND, joined="narrower") + "y = Attention<scale = 0.25>(qq, kk, vv, mask)",
        [],
    ),
    "nothing repeated": ("y = Attention<scale = 0.25>(q, k, v, mask)", []),
}


def model(nodes: str) -> ir.Model:
    """``nodes`` before an Attention of six heads, or with one of their own."""
    nodes = nodes if "Attention" in nodes else nodes + ATTENTION
    cut = "h = Constant<value_ints = [2, 12, 3, 4]>() qq = Reshape(q, h) " if "(qq" in nodes else ""
    shape = "2,12,3,4" if cut else "B,6,3,8"
    inputs = "float[B,6,3,8] q, float[B,2,S,8] k, float[B,2,S,8] v, bool[3,S] mask"
    text = f'<ir_version: 10, opset_import: ["" : 24]> net ({inputs}) => (float[{shape}] y) {{ {cut}{nodes} }}'
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"g/{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(CONSTANTS[name], np.int64), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_takes_the_few_heads(name: str) -> None:
    before, graph = run(model(SPELLINGS[name]), FEEDS)[0], model(SPELLINGS[name])
    report = prove(fuse, graph, [FEEDS])
    assert (report.fused, report.refused) == (1, [])
    assert report.proof is not None
    assert report.proof.held == 1
    assert not {"Unsqueeze", "Tile", "Reshape", "Where"} & count(graph).keys()
    (attention,) = (node for node in graph.graph if node.op_type == "Attention")
    assert [value.name for value in attention.inputs[1:3] if value is not None] == ["k", "v"]
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, FEEDS)[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone(name: str) -> None:
    nodes, reasons = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = fuse(graph)
    assert (report.fused, report.refused) == (0, reasons)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


def test_more_than_heads_repeated_is_no_group() -> None:
    """The keys' places are doubled, too: what attends to them would be told the half."""
    graph = model(both(BY_TILE, "longer"))
    assert (fuse(graph).fused, count(graph)["Tile"]) == (0, 2)


def test_the_number_of_heads_is_still_that_of_the_repeated_ones() -> None:
    graph = model(
        both(BY_EXPAND) + "h = Shape<start = 1, end = 2>(kk) f = Cast<to = 1>(h) z = Mul(q, f) "
        "y = Attention<scale = 0.25>(z, kk, vv, mask)"
    )
    before = run(graph, FEEDS)[0]
    assert fuse(graph).fused == 1
    np.testing.assert_allclose(run(graph, FEEDS)[0], before, rtol=0, atol=1e-6)
