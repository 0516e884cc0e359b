"""Scores in another order of axes, those of keys by queries among them: what fuses, with masks turned along, and what must not."""

import pytest

from tests.exporter.test_attention_rule import S3, P, S, check_fuses, check_refused

KQ = "qt = Transpose<perm=[0,1,3,2]>(q) s = MatMul(k, qt) "
TURNED = "p = Softmax<axis=2>({}) o = Transpose<perm=[0,1,3,2]>(p) y = MatMul(o, v)"

# nodes, line by line, from the inputs to y; the scale; what else there is afterwards
SPELLINGS: dict[str, tuple[str, float, dict[str, int]]] = {
    "scores and probabilities turned": (
        S + "a = Transpose<perm=[0,1,3,2]>(s) m = Mul(a, half) p = Softmax<axis=2>(m) o = Transpose<perm=[0,1,3,2]>(p) "
        "y = MatMul(o, v)",
        0.5,
        {},
    ),
    "scores turned and back, masked behind that": (
        S
        + "a = Transpose<perm=[0,2,3,1]>(s) m = Mul(a, half) t = Transpose<perm=[0,3,1,2]>(m) b = Add(t, bias) "
        + P.format("b"),
        0.5,
        {},
    ),
    "scores turned and back, a scale for each head in between": (
        S + "a = Transpose<perm=[0,2,3,1]>(s) m = Mul(a, last_heads) t = Transpose<perm=[0,3,1,2]>(m) " + P.format("t"),
        1,
        {"Unsqueeze": 1, "Transpose": 1, "Mul": 1},
    ),
    "keys by queries, a scale for each head": (
        KQ + "m = Div(s, logit_scale) " + TURNED.format("m"),
        1,
        {"Div": 1},
    ),
    "turned scores masked": (
        S
        + "a = Transpose<perm=[0,1,3,2]>(s) m = Add(a, turned) p = Softmax<axis=2>(m) o = Transpose<perm=[0,1,3,2]>(p) "
        "y = MatMul(o, v)",
        1,
        {"Transpose": 1},
    ),
    "turned scores cut into heads and joined": (
        S3 + "a = Transpose<perm=[0,2,1]>(s) h = Reshape(a, turned_heads) m = Add(h, turned) p = Softmax<axis=2>(m) "
        "j = Reshape(p, turned_joined) o = Transpose<perm=[0,2,1]>(j) y = MatMul(o, v3)",
        1,
        {"Concat": 4, "Reshape": 4, "Shape": 5, "Slice": 3, "Transpose": 1},
    ),
    "keys by queries": (KQ + TURNED.format("s"), 1, {}),
    "keys by queries, scaled and turned before the Softmax": (
        KQ + "m = Mul(s, half) o = Transpose<perm=[0,1,3,2]>(m) " + P.format("o"),
        0.5,
        {},
    ),
    "keys by queries, Q^T from Q by token": (
        "qt = Transpose<perm=[0,2,3,1]>(k_by_token) s = MatMul(v, qt) p = Softmax<axis=-2>(s) o = Transpose<perm=[0,1,3,2]>(p) "
        "y = MatMul(o, k)",
        1,
        {"Transpose": 1},
    ),
    "keys by queries, masked": (KQ + "w = Where(turned_keep, s, lowest) " + TURNED.format("w"), 1, {"Transpose": 1}),
    "keys by queries, masked before and behind": (
        KQ
        + "m = Add(s, turned) w = Where(hide_column, lowest, m) p = Softmax<axis=-2>(w) o = Transpose<perm=[0,1,3,2]>(p) "
        "y = MatMul(o, v)",
        1,
        {"Transpose": 2, "Where": 1},
    ),
    "keys by queries, a mask of one axis": (
        KQ + "m = Add(s, queries) o = Transpose<perm=[0,1,3,2]>(m) b = Add(o, bias) " + P.format("b"),
        1,
        {"Unsqueeze": 1, "Transpose": 1, "Add": 1},
    ),
    "keys by queries, three axes": (
        "qt = Transpose<perm=[0,2,1]>(q3) s = MatMul(k3, qt) m = Add(s, turned3) p = Softmax<axis=1>(m) "
        "o = Transpose<perm=[0,2,1]>(p) y = MatMul(o, v3)",
        1,
        {"Transpose": 1, "Unsqueeze": 4, "Squeeze": 1},
    ),
    "turned scores guarded behind that": (
        KQ
        + "o = Transpose<perm=[0,1,3,2]>(s) w = Where(keep, o, infinite) p = Softmax(w) n = IsNaN(p) g = Where(n, zero, p) "
        "y = MatMul(g, v)",
        1,
        {},
    ),
}

# nodes that are almost an attention, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "scores turned and back, a scale for each query in between": (
        S
        + "a = Transpose<perm=[0,2,3,1]>(s) m = Mul(a, logit_scale) t = Transpose<perm=[0,3,1,2]>(m) "
        + P.format("t"),
        "not one number for each head",
    ),
    "scores in another order cut": (
        S3 + "a = Transpose<perm=[1,0,2]>(s) h = Reshape(a, turned_heads) p = Softmax(h) j = Reshape(p, turned_joined) "
        "o = Transpose<perm=[1,0,2]>(j) y = MatMul(o, v3)",
        "cuts scores that were transposed",
    ),
    "keys by queries, along the queries": (
        KQ + "p = Softmax(s) o = Transpose<perm=[0,1,3,2]>(p) y = MatMul(o, v)",
        "its axis is -1, not that of the keys",
    ),
    "keys by queries, not turned": (
        KQ + "p = Softmax<axis=2>(s) y = MatMul(p, q)",
        "its axis is 2, not that of the keys",
    ),
    "turned scores guarded": (
        S + "a = Transpose<perm=[0,1,3,2]>(s) p = Softmax<axis=2>(a) n = IsNaN(p) g = Where(n, zero, p) "
        "o = Transpose<perm=[0,1,3,2]>(g) y = MatMul(o, v)",
        "it is guarded, and its scores were transposed",
    ),
    "probabilities turned alone": (
        S + "p = Softmax(s) o = Transpose<perm=[0,1,3,2]>(p) y = MatMul(o, q)",
        "its axis is -1, not that of the keys",
    ),
    "heads and queries exchanged": (
        S + "p = Softmax(s) o = Transpose<perm=[0,2,1,3]>(p) y = MatMul(o, v_one)",
        "V meets the probabilities transposed",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_turned_scores_fuse_and_say_the_same(name: str) -> None:
    check_fuses(*SPELLINGS[name])


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    check_refused(*NEAR_MISSES[name])
