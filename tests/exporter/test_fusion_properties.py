"""Whatever way attention and norms are written: what fuses says the same, what we claim fuses, and what is none is left and named."""

import numpy as np
from hypothesis import HealthCheck, given, note, settings

from tests.exporter.head_spellings import logarithms
from tests.exporter.norm_spellings import norms
from tests.exporter.plain_engine import run
from tests.exporter.rotary_spellings import rotations
from tests.exporter.spellings import Graph, attentions
from txopt.exporter.fusion import FOREIGN, fuse
from txopt.exporter.graph import count
from txopt.exporter.onnx_file import clean

REASONS = {
    "axis": "its axis is",
    "per position": "scales by what is no constant",
    "after the mask": "scales after the mask",
    "negative": "is not positive",
    "capped": "changes the scores",
    "five axes": "adds axes to the scores",
    "broadcast": "broadcasts the scores",
    "showing": "beside which scores still show",
    "read": "is read elsewhere",
    "computed": "scales by what is no constant",
}
NORMS = {
    "axis": "over axes",
    "epsilon outside": "epsilon",
    "epsilon of several": "epsilon",
    "epsilon from outside": "epsilon",
    "read": "reads",
    "cubed": "the exponent is 3",
    "no root": "as a root",
    "dropped": "drops the ax",
}
ROTATIONS = {
    "other way": "neither by halves nor by neighbours",
    "joined otherwise": "joins the columns otherwise",
    "by head": "the same for all heads",
    "columns apart": "the same for both columns",
    "read": "something else reads",
    "another value": "not what is added to it",
    "float64": "float64",
}
LOGARITHMS = {
    "added": "a number is added before",
    "read": "something else reads",
    "masked": "masks by a finite number",
    "two axes": "expected one",
}
bounded = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def fused(spelling: Graph) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Operators after the whole road, and refusals by operator; what is said must not change on the way."""
    before = run(spelling.model(), spelling.feeds)
    model = spelling.model()
    clean(model)
    reports = fuse(model, FOREIGN)
    refused = {operator: report.refused for operator, report in reports.items()}
    note(f"{[(node.op_type, list(node.input)) for node in spelling.nodes]}\n{refused}")
    atol = 1e-5 if all(array.dtype != np.float16 for array in before) else 1e-2
    for expected, found in zip(before, run(model, spelling.feeds), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=atol, atol=atol)
    return count(model), refused


@bounded
@given(attentions())
def test_every_spelling_of_attention_fuses_and_says_the_same(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert refused["Attention"] == []
    assert operators["Attention"] == 1
    assert "Softmax" not in operators


@bounded
@given(attentions(missed=True))
def test_what_is_no_attention_is_left_alone_and_named(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert "Attention" not in operators
    (refusal,) = refused["Attention"]
    assert refusal.startswith("block/Softmax_")
    assert REASONS[str(spelling.reason)] in refusal


@bounded
@given(norms())
def test_every_spelling_of_a_norm_fuses_and_says_the_same(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert refused[spelling.kind] == []
    assert operators[spelling.kind] == 1
    assert "ReduceMean" not in operators


@bounded
@given(norms(missed=True))
def test_what_is_no_norm_is_left_alone_and_named(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert not {"LayerNormalization", "RMSNormalization"} & operators.keys()
    (refusal,) = refused[spelling.kind]
    assert refusal.startswith("block/")
    assert NORMS[str(spelling.reason)] in refusal


@bounded
@given(rotations())
def test_every_spelling_of_a_rotation_fuses_and_says_the_same(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert refused["RotaryEmbedding"] == []
    assert operators["RotaryEmbedding"] == 1
    assert not {"Neg", "Sub"} & operators.keys()


@bounded
@given(rotations(missed=True))
def test_what_is_no_rotation_is_left_alone_and_named(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert "RotaryEmbedding" not in operators
    (refusal,) = refused["RotaryEmbedding"]
    assert refusal.startswith("block/Concat_")
    assert ROTATIONS[str(spelling.reason)] in refusal


@bounded
@given(logarithms())
def test_every_spelling_of_a_log_softmax_fuses_and_says_the_same(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert refused["LogSoftmax"] == []
    assert operators == {"LogSoftmax": 1}


@bounded
@given(logarithms(missed=True))
def test_what_is_no_log_softmax_is_left_alone_and_named(spelling: Graph) -> None:
    operators, refused = fused(spelling)
    assert "LogSoftmax" not in operators
    (refusal,) = refused["LogSoftmax"]
    assert refusal.startswith("block/")
    assert LOGARITHMS[str(spelling.reason)] in refusal
