"""Probabilities that are guarded where a row masks everything: which guards go with the attention, and which must not."""

import pytest

from tests.exporter.test_attention_rule import S, check_fuses, check_refused

# nodes, line by line, from the inputs to y; the scale; what else there is afterwards
SPELLINGS: dict[str, tuple[str, float, dict[str, int]]] = {
    "guarded by IsNaN": (
        S + "w = Where(keep, s, infinite) p = Softmax(w) n = IsNaN(p) g = Where(n, zero, p) y = MatMul(g, v)",
        1,
        {},
    ),
    "guarded by IsNaN, with zeros in the shape of the probabilities": (
        S
        + "w = Where(keep, s, infinite) p = Softmax(w) n = IsNaN(p) l = Shape(p) f = Expand(zero, l) g = Where(n, f, p) "
        "y = MatMul(g, v)",
        1,
        {},
    ),
    "guarded by nan_to_num, as the new exporter writes it": (
        S
        + "w = Where(keep, s, infinite) p = Softmax(w) n = IsNaN(p) g = Where(n, zero, p) i = IsInf(p) l = Less(p, zero) "
        "a = And(l, i) h = Where(a, lowest, g) m = Greater(p, zero) b = And(m, i) j = Where(b, most, h) y = MatMul(j, v)",
        1,
        {},
    ),
    "guarded by nan_to_num, as the old exporter writes it": (
        S
        + "w = Where(keep, s, infinite) p = Softmax(w) n = IsNaN(p) g = Where(n, zero, p) c = Cast<to=1>(g) i = IsInf(c) "
        "m = Greater(g, zero) d = Cast<to=9>(i) e = Cast<to=9>(m) a = And(d, e) h = Where(a, most, g) f = Cast<to=1>(h) "
        "o = IsInf(f) l = Less(h, zero) t = And(o, l) j = Where(t, lowest, h) y = MatMul(j, v)",
        1,
        {},
    ),
    "guarded by the mask once more": (
        S + "w = Where(keep, s, billion) p = Softmax(w) g = Where(keep, p, zero) y = MatMul(g, v)",
        1,
        {},
    ),
    "guarded by the mask once more, beside a bias": (
        S + "w = Where(keep, s, billion) a = Add(w, bias) p = Softmax(a) g = Where(keep, p, zero) y = MatMul(g, v)",
        1,
        {"Add": 1, "Where": 1},
    ),
    "guarded by the mask once more, which says what is hidden": (
        S + "h = Not(keep) w = Where(h, lowest, s) p = Softmax(w) g = Where(h, zero, p) y = MatMul(g, v)",
        1,
        {"Not": 2},
    ),
    "guarded where all is masked": (
        S
        + "w = Where(keep, s, infinite) p = Softmax(w) e = Equal(w, infinite) c = Cast<to=7>(e) r = ReduceMin<keepdims=1>(c, keys) "
        "n = Cast<to=9>(r) g = Where(n, zero, p) y = MatMul(g, v)",
        1,
        {},
    ),
    "guarded where not any is left": (
        S + "w = Where(keep, s, infinite) p = Softmax(w) e = Equal(infinite, w) o = Not(e) c = Cast<to=7>(o) "
        "r = ReduceMax<keepdims=1>(c, keys) a = Cast<to=9>(r) n = Not(a) g = Where(n, zero, p) y = MatMul(g, v)",
        1,
        {},
    ),
}

# nodes that are almost an attention, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "guarded by another mask": (
        S + "w = Where(keep, s, billion) h = Not(hide) p = Softmax(w) g = Where(h, p, zero) y = MatMul(g, v)",
        "changes the probabilities by another mask than the scores'",
    ),
    "guarded by what the scores' mask keeps": (
        S + "w = Where(keep, s, billion) p = Softmax(w) g = Where(keep, zero, p) y = MatMul(g, v)",
        "changes the probabilities by another mask than the scores'",
    ),
    "guarded by a mask that only the probabilities have": (
        S + "p = Softmax(s) g = Where(keep, p, zero) y = MatMul(g, v)",
        "changes the probabilities by another mask than the scores'",
    ),
    "guarded by its mask, and by more than zeros": (
        S + "w = Where(keep, s, billion) p = Softmax(w) g = Where(keep, p, one) y = MatMul(g, v)",
        "changes the probabilities",
    ),
    "guarded by ones": (
        S + "p = Softmax(s) n = IsNaN(p) g = Where(n, one, p) y = MatMul(g, v)",
        "block/Where_4 fills rows that mask everything with 1, the operator with zeros",
    ),
    "large probabilities changed behind a guard": (
        S + "p = Softmax(s) n = IsNaN(p) g = Where(n, zero, p) m = Greater(p, half) j = Where(m, zero, g) y = MatMul(j, v)",
        "read elsewhere",
    ),
    "a guard that something else reads": (
        S + "p = Softmax(s) n = IsNaN(p) g = Where(n, zero, p) x = MatMul(g, v) r = ReduceMax(g) y = Add(x, r)",
        "g is read elsewhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_guarded_attention_fuses_and_says_the_same(name: str) -> None:
    check_fuses(*SPELLINGS[name])


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    check_refused(*NEAR_MISSES[name])
