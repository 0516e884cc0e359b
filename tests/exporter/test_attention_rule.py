"""Written-out attention in foreign graphs: every spelling that fuses, what must not and why, and that the numbers stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.attention_graphs import feeds, model
from tests.exporter.plain_engine import run, scale_attention
from txopt.exporter.fusion.attention import fuse
from txopt.exporter.graph import count

FP32 = {"rtol": 0.0, "atol": 1e-5}
FP16 = {"rtol": 0.0, "atol": 4e-3}

KT = "kt = Transpose<perm=[0,1,3,2]>(k) "
KT3 = "kt = Transpose<perm=[0,2,1]>(k3) "
S = KT + "s = MatMul(q, kt) "
S3 = KT3 + "s = MatMul(q3, kt) "
S5 = "kt = Transpose<perm=[0,1,2,4,3]>(k5) s = MatMul(q5, kt) "
P = "p = Softmax<axis=-1>({}) y = MatMul(p, v)"
P5 = "p = Softmax<axis=-1>({}) y = MatMul(p, v5)"
P3 = "p = Softmax<axis=-1>({}) y = MatMul(p, v3)"
WIDER = {"Shape": 2, "Concat": 1, "Expand": 1}

# nodes, line by line, from the inputs to y; the scale; what else there is afterwards
SPELLINGS: dict[str, tuple[str, float, dict[str, int]]] = {
    "no scale, no mask": (S + P.format("s"), 1, {}),
    "the axis by its number": (S + "p = Softmax<axis=3>(s) y = MatMul(p, v)", 1, {}),
    "K^T from K by token": (
        "kt = Transpose<perm=[0,2,3,1]>(k_by_token) s = MatMul(q, kt) " + P.format("s"),
        1,
        {"Transpose": 1},
    ),
    "K^T through three axes": (
        "a = Reshape(k, shape_k3) b = Transpose<perm=[0,2,1]>(a) kt = Reshape(b, shape_kt) s = MatMul(q, kt) "
        + P.format("s"),
        1,
        {"Reshape": 2, "Transpose": 2},
    ),
    "K^T through three axes, by their lengths": (
        "l = Shape<start=2>(k) j = Concat<axis=0>(keys, l) a = Reshape(k, j) b = Transpose<perm=[0,2,1]>(a) "
        "m = Shape<end=2>(k) d = Shape<start=3>(k) n = Shape<start=2,end=3>(k) c = Concat<axis=0>(m, d, n) kt = Reshape(b, c) "
        "s = MatMul(q, kt) " + P.format("s"),
        1,
        {},
    ),
    "scores scaled": (S + "m = Mul(half, s) " + P.format("m"), 0.5, {}),
    "scores divided": (S + "m = Div(s, two) " + P.format("m"), 0.5, {}),
    "Q scaled": (KT + "a = Mul(q, half) s = MatMul(a, kt) " + P.format("s"), 0.5, {}),
    "K scaled before it is turned": (
        "a = Div(k, two) kt = Transpose<perm=[0,1,3,2]>(a) s = MatMul(q, kt) " + P.format("s"),
        0.5,
        {},
    ),
    "the root on both": (
        KT + "a = Mul(q, root_half) b = Mul(kt, root_half) s = MatMul(a, b) " + P.format("s"),
        0.5,
        {},
    ),
    "the root of a length, as TorchScript computes it": (
        S + "l = Shape<start=3>(q) f = Cast<to=1>(l) r = Sqrt(f) m = Div(s, r) " + P.format("m"),
        0.5,
        {},
    ),
    "a bias": (S + "m = Mul(s, half) a = Add(m, bias) " + P.format("a"), 0.5, {}),
    "a bias on the other side": (S + "a = Add(bias, s) " + P.format("a"), 1, {}),
    "a bias subtracted": (S + "a = Sub(s, bias) " + P.format("a"), 1, {"Neg": 1}),
    "a bias for all queries": (S + "a = Add(s, row) " + P.format("a"), 1, WIDER),
    "a bias of two axes": (S + "a = Add(s, plane) " + P.format("a"), 1, {}),
    "two biases, one by one": (S + "a = Add(s, position) b = Add(a, row) " + P.format("b"), 1, {"Add": 1}),
    "two biases, summed": (S + "m = Add(position, row) a = Add(s, m) " + P.format("a"), 1, {"Add": 1}),
    "a mask that keeps": (S + "w = Where(keep, s, infinite) " + P.format("w"), 1, {}),
    "a mask that keeps, with the least number": (S + "w = Where(keep, s, lowest) " + P.format("w"), 1, {}),
    "a mask that hides": (S + "w = Where(hide, infinite, s) " + P.format("w"), 1, {"Not": 1} | WIDER),
    "two masks": (
        S + "w = Where(keep, s, lowest) x = Where(hide, lowest, w) " + P.format("x"),
        1,
        {"Not": 1, "And": 1},
    ),
    "a mask that drowns": (S + "w = Where(keep, s, billion) " + P.format("w"), 1, {"Where": 1}),
    "a mask after a bias": (S + "a = Add(s, position) w = Where(hide, lowest, a) " + P.format("w"), 1, {"Where": 1}),
    "a bias after a mask": (
        S + "w = Where(keep, s, lowest) a = Add(w, position) " + P.format("a"),
        1,
        {"Where": 1, "Add": 1},
    ),
    "a fill that is expanded": (
        S + "l = Shape(s) f = Expand(infinite, l) w = Where(keep, s, f) " + P.format("w"),
        1,
        {},
    ),
    "a floor below every score": (S + "a = Add(s, bias) m = Max(a, lowest) " + P.format("m"), 1, {}),
    "casts and dropout": (
        S
        + "c = Cast<to=1>(s) p = Softmax(c) d = Cast<to=1>(p) e = Dropout(d, ratio, no) i = Identity(e) y = MatMul(i, v)",
        1,
        {},
    ),
    "one head of K and V for all": (
        "kt = Transpose<perm=[0,1,3,2]>(k_one) s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v_one)",
        1,
        {},
    ),
    "three axes": (S3 + P3.format("s"), 1, {"Unsqueeze": 3, "Squeeze": 1}),
    "three axes, a bias of three": (S3 + "a = Add(bias3, s) " + P3.format("a"), 1, {"Unsqueeze": 4, "Squeeze": 1}),
    "three axes, a bias of two": (S3 + "a = Add(s, plane) " + P3.format("a"), 1, {"Unsqueeze": 3, "Squeeze": 1}),
    "three axes, cut for the mask": (
        S3 + "h = Reshape(s, by_head) a = Add(h, bias) j = Reshape(a, joined) " + P3.format("j"),
        1,
        {"Slice": 3, "Shape": 5, "Concat": 4, "Reshape": 4},
    ),
    "three axes, cut for two masks, joined after the Softmax": (
        S3
        + "h = Reshape(s, by_head) a = Add(h, bias) j = Reshape(a, joined) g = Reshape(j, by_head) w = Where(hide, lowest, g) "
        "p = Softmax(w) f = Reshape(p, joined) y = MatMul(f, v3)",
        1,
        {"Slice": 3, "Shape": 5, "Concat": 4, "Reshape": 4, "Where": 1},
    ),
    "three axes, a bias of three, cut for a mask and joined": (
        S3 + "m = Add(s, bias3) h = Reshape(m, by_head) a = Add(h, bias) j = Reshape(a, joined) " + P3.format("j"),
        1,
        {"Slice": 4, "Shape": 6, "Concat": 5, "Reshape": 5, "Add": 1},
    ),
    "five axes": (S5 + P5.format("s"), 1, {"Shape": 8, "Concat": 4, "Reshape": 4}),
    "five axes, a bias of five and one of two": (
        S5 + "a = Add(s, bias5) b = Add(a, plane) " + P5.format("b"),
        1,
        {"Shape": 13, "Concat": 6, "Reshape": 5, "Expand": 1, "Add": 1},
    ),
    "five axes, one head for each group": (
        "kt = Transpose<perm=[0,1,2,4,3]>(k5_one) s = MatMul(q5, kt) p = Softmax(s) y = MatMul(p, v5_one)",
        1,
        {"Shape": 8, "Concat": 4, "Reshape": 4},
    ),
    "five axes, one head for each group, a bias of five": (
        "kt = Transpose<perm=[0,1,2,4,3]>(k5_one) s = MatMul(q5, kt) a = Add(s, bias5) p = Softmax(a) y = MatMul(p, v5_one)",
        1,
        {"Shape": 13, "Concat": 6, "Reshape": 5, "Expand": 1},
    ),
    "three axes, cut by known lengths": (
        S3 + "h = Reshape(s, by_known) a = Add(h, bias) j = Reshape(a, joined) " + P3.format("j"),
        1,
        {"Slice": 3, "Shape": 2, "Concat": 4, "Reshape": 4},
    ),
    "three axes, cut for V": (
        S3 + "h = Reshape(s, by_head) " + P.format("h"),
        1,
        {"Slice": 2, "Shape": 2, "Concat": 2, "Reshape": 2},
    ),
}

# nodes that are almost an attention, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "another axis": (S + "p = Softmax<axis=2>(s) y = MatMul(p, v)", "its axis is 2"),
    "scaled after the mask": (S + "a = Add(s, bias) m = Mul(a, half) " + P.format("m"), "scales after the mask"),
    "a negative scale": (S + "m = Mul(s, minus) " + P.format("m"), "not positive"),
    "by the scores": (S + "m = Div(two, s) " + P.format("m"), "no constant"),
    "from a bias": (S + "a = Sub(bias, s) " + P.format("a"), "subtracts the scores"),
    "turned round": (S + "n = Neg(s) " + P.format("n"), "changes the scores"),
    "squared": (S + "n = Pow(s, two) " + P.format("n"), "changes the scores"),
    "a soft cap": (S + "c = Tanh(s) " + P.format("c"), "changes the scores"),
    "a mask of the scores": (S + "w = Where(keep, s, zero) a = Add(s, w) " + P.format("a"), "s is read elsewhere too, by block/"),
    "scores twice": (S + "a = Add(s, s) " + P.format("a"), "s is read elsewhere too, by block/Add_2"),
    "scores read elsewhere": (
        S + "p = Softmax(s) x = MatMul(p, v) r = ReduceMax(s) y = Add(x, r)",
        "s is read elsewhere too, by block/ReduceMax_4",
    ),
    "probabilities read elsewhere": (
        S + "p = Softmax(s) x = MatMul(p, v) r = ReduceMax(p) y = Add(x, r)",
        "p is read elsewhere too, by block/ReduceMax_4",
    ),
    "some heads off": (S + "p = Softmax(s) h = Mul(p, head_mask) y = MatMul(h, v)", "changes the probabilities"),
    "dropout in training": (S + "p = Softmax(s) d = Dropout(p, ratio, yes) y = MatMul(d, v)", "changes the probabilities"),
    "a fill beside which scores show": (S + "w = Where(keep, s, thousands) " + P.format("w"), "-10000"),
    "a fill that is computed": (S + "w = Where(keep, s, bias) " + P.format("w"), "fills with what is no constant"),
    "a floor above some scores": (S + "m = Max(s, zero) " + P.format("m"), "fills with 0"),
    "one head of K for all, not of V": ("kt = Transpose<perm=[0,1,3,2]>(k_one) s = MatMul(q, kt) " + P.format("s"), "the heads"),
    "one head of K for each group, not of V": (
        "kt = Transpose<perm=[0,1,2,4,3]>(k5_one) s = MatMul(q5, kt) " + P5.format("s"),
        "the groups",
    ),
    "a batch that broadcasts": (
        "kt = Transpose<perm=[0,1,3,2]>(k_single) s = MatMul(q, kt) " + P.format("s"),
        "the batches",
    ),
    "a sink": (
        S + "c = Concat<axis=-1>(s, sinks) p = Softmax(c) o = Slice(p, first, last_one, keys) y = MatMul(o, v)",
        "block/Concat_2 adds to the scores (a sink, or other keys)",
    ),
    "a column less": (
        S + "p = Softmax(s) o = Slice(p, first, last_one, keys) t = Slice(v, first, last_one, rows_axis) y = MatMul(o, t)",
        "block/Slice_3 cuts the probabilities",
    ),
    "six axes": (
        "a = Unsqueeze(q5, keys) kt = Transpose<perm=[0,1,2,3,5,4]>(a) s = MatMul(a, kt) p = Softmax(s) y = MatMul(p, a)",
        "6 axes",
    ),
    "an unknown rank": ("a = Expand(q, any) kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(a, kt) " + P.format("s"), "ranks"),
    "three axes, cut otherwise": (
        S3 + "h = Reshape(s, wrongly) j = Reshape(h, joined) " + P3.format("j"),
        "changes queries or keys",
    ),
}  # fmt: skip

NO_ATTENTION = {
    "a classifier": "l = MatMul(q, weight) y = Softmax(l)",
    "a classifier whose classes have values": "l = MatMul(q, weight) p = Softmax(l) y = MatMul(p, values)",
    "probabilities without values": S + "y = Softmax(s)",
    "weights for values": "p = Softmax(q) y = MatMul(p, k)",
}


def bytes_of(graph: ir.Model) -> bytes:
    return ir.to_proto(graph).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_attention_fuses_and_says_the_same(name: str) -> None:
    check_fuses(*SPELLINGS[name])


def check_fuses(nodes: str, scale: float, others: dict[str, int]) -> None:
    """``nodes`` become one Attention of this scale, beside ``others``, and say what they said."""
    graph = model(nodes)
    given = feeds(graph)
    before = run(graph, given)[0]
    report = fuse(graph)
    assert (report.operator, report.fused, report.refused) == ("Attention", 1, [])
    assert count(graph) == {"Attention": 1} | others
    (node,) = (node for node in graph.graph if node.op_type == "Attention")
    assert node.attributes["scale"].as_float() == pytest.approx(scale)
    assert len(node.outputs) == 1
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, given)[0], before, **FP32)


@pytest.mark.parametrize("name", ["the root on both", "a bias", "a mask that keeps, with the least number"])
def test_a_changed_scale_fails_the_tolerance(name: str) -> None:
    graph = model(SPELLINGS[name][0])
    given = feeds(graph)
    before = run(graph, given)[0]
    fuse(graph)
    scale_attention(graph, 1.01)
    assert not np.allclose(run(graph, given)[0], before, **FP32)


def test_attentions_that_share_their_scores_name_each_other() -> None:
    """The exporters, and the cleaning of files, make one product of two that are equal; its name is that of the first."""
    block = "m{0} = Mul(s, {1}) p{0} = Softmax(m{0}) {2} = MatMul(p{0}, v) "
    report = fuse(model(S + block.format(1, "half", "w") + block.format(2, "two", "x") + "y = Add(w, x)"))
    assert report.refused == [
        "block/Softmax_3: s is read elsewhere too, by block/Mul_5",
        "block/Softmax_6: s is read elsewhere too, by block/Mul_2",
    ]


@pytest.mark.parametrize(
    "nodes",
    [
        S + "m = Mul(s, half) c = Cast<to=1>(m) p = Softmax(c) d = Cast<to=10>(p) y = MatMul(d, v)",
        "a = Cast<to=1>(q) b = Cast<to=1>(k) kt = Transpose<perm=[0,1,3,2]>(b) s = MatMul(a, kt) p = Softmax(s) "
        "d = Cast<to=10>(p) y = MatMul(d, v)",
        S + "c = Cast<to=1>(s) f = Cast<to=1>(bias) a = Add(c, f) w = Where(keep, a, lowest) p = Softmax(w) d = Cast<to=10>(p) "
        "y = MatMul(d, v)",
    ],
    ids=["probabilities", "scores", "masks"],
)  # fmt: skip
def test_float32_between_halves_stays_in_the_softmax(nodes: str) -> None:
    graph = model(nodes, "float16")
    given = feeds(graph)
    before = run(graph, given)[0]
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    (node,) = (node for node in graph.graph if node.op_type == "Attention")
    assert node.attributes["softmax_precision"].as_int() == onnx.TensorProto.FLOAT
    assert {value.dtype for value in node.inputs[:3] if value} == {ir.DataType.FLOAT16}
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    after = run(graph, given)[0]
    assert after.dtype == np.float16
    np.testing.assert_allclose(after, before, **FP16)


def test_blocks_that_are_masked_alike_share_the_mask() -> None:
    block = "a{0} = Add({1}, position) b{0} = Add(a{0}, row) p{0} = Softmax(b{0}) {2} = MatMul(p{0}, v) "
    graph = model(S + block.format(1, "s", "x") + "t = MatMul(x, kt) " + block.format(2, "t", "y"))
    given = feeds(graph)
    before = run(graph, given)[0]
    assert fuse(graph).fused == 2
    assert count(graph) == {"Add": 1, "Attention": 2}
    np.testing.assert_allclose(run(graph, given)[0], before, **FP32)


def test_a_shared_mask_comes_before_whichever_block_ends_first() -> None:
    graph = model(
        S + "n = Neg(q) r = MatMul(n, kt) a = Add(s, position) b = Add(a, row) c = Add(r, position) d = Add(c, row) "
        "p = Softmax(b) o = Softmax(d) x = MatMul(o, v) z = MatMul(p, v) y = Add(x, z)"
    )
    assert fuse(graph).fused == 2
    assert count(graph) == {"Add": 2, "Attention": 2, "Neg": 1}
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    check_refused(*NEAR_MISSES[name])


def check_refused(nodes: str, reason: str) -> None:
    """``nodes`` stay as they are, and their Softmax is told with ``reason``."""
    graph = model(nodes)
    untouched = bytes_of(graph)
    report = fuse(graph)
    assert report.fused == 0
    assert len(report.refused) == 1
    assert report.refused[0].startswith("block/Softmax")
    assert reason in report.refused[0]
    assert bytes_of(graph) == untouched


@pytest.mark.parametrize("output", ["s", "p"])
def test_what_the_graph_gives_away_is_kept(output: str) -> None:
    graph = model(S + P.format("s"))
    graph.graph.outputs.extend(value for node in graph.graph for value in node.outputs if value.name == output)
    untouched = bytes_of(graph)
    report = fuse(graph)
    assert report.refused == [f"block/Softmax_2: {output} is an output of the graph"]
    assert bytes_of(graph) == untouched


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_another_softmax_is_no_refusal(name: str) -> None:
    report = fuse(model(NO_ATTENTION[name]))
    assert (report.fused, report.refused) == (0, [])
