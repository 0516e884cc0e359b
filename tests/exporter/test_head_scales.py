"""Scores that are scaled by a number for each head: where it moves to the queries, and what must not."""

import pytest

from tests.exporter.attention_graphs import model
from tests.exporter.test_attention_rule import KT, P3, P5, S3, S5, P, S, bytes_of, check_fuses, check_refused
from txopt.exporter.fusion.attention import fuse

# nodes, line by line, from the inputs to y; the scale; what else there is afterwards
SPELLINGS: dict[str, tuple[str, float, dict[str, int]]] = {
    "a scale that is computed": (S + "f = Cast<to=1>(rows) m = Mul(s, f) " + P.format("m"), 1, {"Cast": 1, "Mul": 1}),
    "a scale for each head": (S + "m = Mul(s, scale_by_head) " + P.format("m"), 1, {"Mul": 1}),
    "a scale for each head, without an axis of batches": (
        S + "f = Exp(logit_scale) m = Mul(f, s) a = Add(m, bias) " + P.format("a"),
        1,
        {"Exp": 1, "Mul": 1},
    ),
    "a temperature for each head": (S + "m = Div(s, two) d = Div(m, scale_by_head) " + P.format("d"), 0.5, {"Div": 1}),
    "a scale for each head of each row": (S + "m = Mul(s, scale_by_row) " + P.format("m"), 1, {"Mul": 1}),
    "a scale for each head on Q": (
        KT + "a = Mul(q, logit_scale) s = MatMul(a, kt) " + P.format("s"),
        1,
        {"Mul": 1},
    ),
    "a scale for each head on K": (
        "a = Mul(k, logit_scale) kt = Transpose<perm=[0,1,3,2]>(a) s = MatMul(q, kt) " + P.format("s"),
        1,
        {"Mul": 1},
    ),
    "three axes, a scale for each head beside a mask": (
        S3
        + "h = Reshape(s, by_head) m = Mul(h, scale_by_head) a = Add(m, bias) j = Reshape(a, joined) "
        + P3.format("j"),
        1,
        {"Slice": 3, "Shape": 5, "Concat": 4, "Reshape": 4, "Mul": 1},
    ),
    "three axes, a scale for each": (
        S3 + "m = Mul(s, scale3) " + P3.format("m"),
        1,
        {"Unsqueeze": 3, "Squeeze": 1, "Mul": 1},
    ),
    "five axes, a scale for each group": (
        S5 + "m = Div(s, scale5) " + P5.format("m"),
        1,
        {"Shape": 8, "Concat": 4, "Reshape": 4, "Div": 1},
    ),
}

# nodes that are almost an attention, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "a scale for each head after the mask": (S + "a = Add(s, bias) m = Mul(a, logit_scale) " + P.format("m"), "scales after the mask"),
    "a scale for each query": (S + "m = Mul(s, row_scale) " + P.format("m"), "no constant, and not one number for each head"),
    "a scale for each key": (S + "m = Mul(s, row) " + P.format("m"), "no constant, and not one number for each head"),
    "a scale for each head that adds heads": (
        "kt = Transpose<perm=[0,1,3,2]>(k_one) s = MatMul(k_one, kt) m = Mul(s, logit_scale) p = Softmax(m) y = MatMul(p, v_one)",
        "broadcasts the scores",
    ),
    "divided by the scores, for each head": (S + "m = Div(logit_scale, s) " + P.format("m"), "no constant"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_scale_for_each_head_fuses_and_says_the_same(name: str) -> None:
    check_fuses(*SPELLINGS[name])


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    check_refused(*NEAR_MISSES[name])


def test_a_scale_in_float32_is_not_rounded_to_half_queries() -> None:
    graph = model(
        S + "c = Cast<to=1>(s) m = Mul(c, scale32) p = Softmax(m) d = Cast<to=10>(p) y = MatMul(d, v)", "float16"
    )
    untouched = bytes_of(graph)
    assert fuse(graph).refused == [
        "block/Softmax_4: the scores are scaled by scale32, which is FLOAT, and Q is FLOAT16"
    ]
    assert bytes_of(graph) == untouched
