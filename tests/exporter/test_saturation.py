"""Clamps of infinities: which are found, what stays, and that what is made says the same of everything finite."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.calibration.graphs import engine, parsed
from txopt.benchmarks import gpu_models
from txopt.exporter.fusion import fuse, saturation
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact

LARGEST = 65504.0


def graph(
    *,
    most: float = LARGEST,
    less: float = 64504.0,
    wide: str = "wide = Cast<to = 1>(x)",
    infinity: str = "IsInf",
    some: str = "some = Cast<to = 9>(any)",
    lower: str = "n",
    bound: str = "h",
) -> ir.Model:
    """transformers' clamp, and what is nearly one."""
    return parsed(
        f"""(float16[R,4] x, float16[R,4] y) => (float16[R,4] z)
        <float most = {{{most}}}, float less = {{{less}}}>
        {{
            {wide}
            i = {infinity}(wide)
            c = Cast<to = 7>(i)
            any = ReduceMax<keepdims = 0>(c)
            {some}
            w = Where(some, less, most)
            m = Neg(w)
            n = Cast<to = 10>(m)
            h = Cast<to = 10>(w)
            high = Max(x, {lower})
            z = Min(high, {bound})
        }}"""
    )


def said(model: ir.Model, x: NDArray[np.float16]) -> NDArray[np.float16]:
    found: NDArray[np.float16] = np.asarray(engine(model, as_written=True, x=x, y=x)[0])
    return found


FINITE = np.array([[1, -2, 65504, -65504], [65000, 0, -0.0, 6e-8]], np.float16)


def test_a_clamp_of_infinities_is_one_clip_that_says_the_same_of_all_that_is_finite() -> None:
    model = graph()
    before = said(model, FINITE)
    report = saturation.fuse(model)
    assert (report.fused, [node.op_type for node in model.graph]) == (1, ["Clip"])
    np.testing.assert_array_equal(said(model, FINITE), before)
    np.testing.assert_array_equal(before, FINITE)


def test_what_overflowed_is_finite_and_other_rows_are_left_alone() -> None:
    model = graph()
    x = FINITE.copy()
    x[0] = [np.inf, -np.inf, 3, 4]
    before = said(model, x)
    saturation.fuse(model)
    assert before[1, 0] == 64512  # the row below hears of it in transformers
    np.testing.assert_array_equal(said(model, x), [[LARGEST, -LARGEST, 3, 4], FINITE[1]])


@pytest.mark.parametrize(
    "other",
    [
        {"most": 1000.0, "less": 10.0},
        {"less": 65504.0},
        {"less": -1.0},
        {"wide": "wide = Cast<to = 1>(y)"},
        {"wide": "all = ReduceSum<keepdims = 0>(x) wide = Cast<to = 1>(all)"},  # of finite numbers it may be infinite
        {"wide": "half = Cast<to = 1>(x) wide = Cast<to = 10>(half)"},
        {"some": "other = Cast<to = 9>(any) some = Not(other)"},
        {"some": "also = Max(any, any) some = Cast<to = 9>(also)"},
        {"infinity": "IsInf<detect_negative = 0>"},
        {"infinity": "IsNaN"},
        {"lower": "h"},
        {"bound": "n"},
        {"bound": "y"},
    ],
    ids=str,
)
def test_another_clamp_stays(other: dict[str, object]) -> None:
    model = graph(**other)  # type: ignore[arg-type]
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert saturation.fuse(model).fused == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_t5_in_half_precision_asks_nobody_about_all_rows(tmp_path: Path) -> None:
    made: Artifact = export(gpu_models.small("T5"), tmp_path / "out", precision="fp16", prove=True)
    nodes = made.manifest.fusion["decoder"]["nodes"]
    assert made.manifest.fusion["decoder"]["patterns"]["Clip"]["fused"] == 6
    assert not {"IsInf", "ReduceMax"} & nodes.keys()


def test_every_road_has_the_rule() -> None:
    assert fuse(graph())["Clip"].fused == 1
