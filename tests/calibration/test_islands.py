"""Which nodes stay in float32, and why: a table of reasons, each with its near miss."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import parsed
from tests.calibration.made import normal
from txopt.calibration.dtypes import infer
from txopt.calibration.islands import LARGEST, MARGIN, Islands, choose, masks_of
from txopt.calibration.magnitudes import Magnitudes

FEED_FORWARD = """(float[2,4] x) => (float[2,4] y) {
    h = MatMul(x, wi)
    r = Relu(h)
    o = MatMul(r, wo)
    s = Add(x, o)
    n = RMSNormalization(s, g)
    y = MatMul(n, wi)
}"""
WEIGHTS = {"wi": normal(4, 4), "wo": normal(4, 4, seed=1), "g": np.ones(4, np.float32)}


def chosen(model: ir.Model, sums: dict[str, float] | None = None, **seen: float) -> Islands:
    infer(model)
    return choose(model, Magnitudes(values=seen, sums=sums or {}))


def kept(islands: Islands) -> list[str]:
    return [node.op_type for node in islands.nodes]


def why(islands: Islands) -> set[str]:
    return {str(reason.why) for reasons in islands.nodes.values() for reason in reasons}


def test_what_makes_a_large_value_and_what_reads_it_is_kept_and_nothing_else() -> None:
    """T5: the second projection of the feed-forward block, the residual stream, and the norm that ends it."""
    islands = chosen(parsed(FEED_FORWARD, **WEIGHTS), o=1e5, s=1e5)
    assert kept(islands) == ["MatMul", "Add", "RMSNormalization"]
    assert islands.to_json() == [
        {
            "nodes": ["o", "s", "n"],
            "reasons": [
                {"why": "overflow", "tensor": "o", "largest": 1e5},
                {"why": "overflow", "tensor": "s", "largest": 1e5},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("largest", "reason"),
    [
        (LARGEST / MARGIN, None),
        (LARGEST / MARGIN * 1.001, "overflow"),
        (3e38, "overflow"),
        (2.0**-14, None),
        (2.0**-14 * 0.999, "underflow"),
        (0.0, None),  # nothing but zeros: rounding keeps them
    ],
)
def test_a_value_may_come_within_the_margin_of_the_largest_number_and_down_to_the_smallest(
    largest: float, reason: str | None
) -> None:
    islands = chosen(parsed(FEED_FORWARD, **WEIGHTS), r=largest)
    assert kept(islands) == ([] if reason is None else ["Relu", "MatMul"])
    assert why(islands) == (set() if reason is None else {reason})


@pytest.mark.parametrize(("total", "count"), [(LARGEST, 0), (LARGEST * 1.001, 1)])
def test_a_product_whose_partial_sums_may_overflow_is_kept_alone(total: float, count: int) -> None:
    islands = chosen(parsed(FEED_FORWARD, **WEIGHTS), sums={"h": total}, h=3.0)
    assert [str(node.outputs[0].name) for node in islands.nodes] == ["h"][:count]
    assert why(islands) == {"sum"} or not count


@pytest.mark.parametrize(
    ("number", "reason"),
    [(2.0**-20, None), (1e-6, "constant"), (1e-12, "constant"), (-np.inf, None), (7e4, "constant")],
)
def test_a_constant_that_float16_does_not_hold_keeps_its_reader(number: float, reason: str | None) -> None:
    """Neither of the first two is a normal number of float16; 1e-6 is off by 1 %, 1e-12 becomes 0."""
    model = parsed("(float[2,4] x) => (float[2,4] y) { s = Add(x, c) y = Relu(s) }", c=np.array(number, np.float32))
    assert why(chosen(model)) == (set() if reason is None else {reason})


def test_a_matrix_of_tiny_numbers_keeps_its_product() -> None:
    model = parsed("(float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", w=normal(4, 4) * np.float32(1e-7))
    assert why(chosen(model)) == {"constant"}


def test_what_is_counted_stays_float32_and_what_is_looked_up_does_not() -> None:
    """An angle: position 2049 has no float16."""
    text = """(int64[2] position, int64[2] ids) => (float[2,4] y) {
        p = Cast<to=1>(position)
        c = Unsqueeze(p, one)
        a = MatMul(c, frequencies)
        s = Sin(a)
        e = Gather(table, ids)
        y = Add(e, s)
    }"""
    model = parsed(text, one=np.array([1]), frequencies=normal(1, 4), table=normal(9, 4))
    islands = chosen(model)
    assert kept(islands) == ["Cast", "Unsqueeze", "MatMul", "Sin"]
    assert why(islands) == {"counted"}


ATTENTION = """(float[1,2,3,4] q, float[1,2,3,4] k, int64[1,3] mask) => (float[1,2,3,4] y) {
    m = Cast<to=1>(mask)
    a = Sub(one, m)
    f = Mul(a, fill)
    u = Unsqueeze(f, axes)
    e = Expand(u, shape)
    y = Attention(q, k, k, e)
}"""
MASK = {"one": np.array(1, np.float32), "axes": np.array([1, 2]), "shape": np.array([1, 1, 3, 3])}


def test_a_mask_needs_no_island() -> None:
    model = parsed(ATTENTION, fill=np.array(np.finfo(np.float32).min), **MASK)
    infer(model)
    assert {str(value.name) for value in masks_of(model.graph)} == {"m", "one", "a", "fill", "f", "u", "e"}
    assert kept(chosen(model, f=3.4e38, u=3.4e38, e=3.4e38)) == []


def test_a_mask_that_something_else_reads_is_a_value_like_others() -> None:
    text = ATTENTION.replace("(float[1,2,3,4] y)", "(float[1,2,3,4] y, float[1,1,3,3] z)").replace(
        "y = A", "z = Neg(e) y = A"
    )
    model = parsed(text, fill=np.array(np.finfo(np.float32).min), **MASK)
    assert "Attention" in kept(chosen(model, f=3.4e38, u=3.4e38, e=3.4e38, z=3.4e38))


def test_an_operator_without_float16_is_kept() -> None:
    model = parsed(
        "(float x) => (float[N] y) { r = Range(zero, x, one) y = Relu(r) }",
        zero=np.zeros((), "f"),
        one=np.ones((), "f"),
    )
    islands = chosen(model)
    assert kept(islands) == ["Range"]
    assert why(islands) == {"operator"}


@pytest.mark.parametrize(
    ("between", "expected"), [("Relu(a)", ["Exp", "Relu", "Exp"]), ("MatMul(a, w)", ["Exp", "Exp"])]
)
def test_a_cheap_node_between_two_islands_joins_them(between: str, expected: list[str]) -> None:
    text = f"(float[4,4] x) => (float[4,4] y) {{ h = Exp(x) a = Tanh(h) b = {between} i = Exp(b) y = Tanh(i) }}"
    islands = chosen(parsed(text, w=normal(4, 4)), h=1e5, i=1e5)
    assert [kind for kind in kept(islands) if kind != "Tanh"] == expected


def test_islands_are_told_apart() -> None:
    text = "(float[4,4] x) => (float[4,4] y) { h = Exp(x) a = Tanh(h) b = MatMul(a, w) i = Exp(b) y = Tanh(i) }"
    found = chosen(parsed(text, w=normal(4, 4)), h=1e5, i=2e5).to_json()
    assert [each["nodes"] for each in found] == [["h", "a"], ["i", "y"]]
    assert [each["reasons"][0]["largest"] for each in found] == [1e5, 2e5]
