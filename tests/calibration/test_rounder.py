"""Which moments a weight is rounded by, and that nothing is rounded twice."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import parsed
from tests.calibration.made import correlated, normal
from txopt.calibration.clipping import clip
from txopt.calibration.descent import descended
from txopt.calibration.moments import damped, second_moments
from txopt.calibration.recipe import Recipe
from txopt.calibration.rounder import LOOKED_UP, Rounder
from txopt.calibration.weights import Method, quantize

ENCODER = "(int64[B,T] ids) => (float[B,T,K] y) { h = Gather(shared, ids)  y = MatMul(h, w) }"
DECODER = "(int64[B,Q] ids) => (float[B,Q,V] y) { h = Gather(table, ids)  t = Transpose(table)  y = MatMul(h, t) }"
TABLE, WEIGHT = normal(90, 64), normal(64, 64, seed=1)
SEEN = {
    "encoder": {"h": second_moments(correlated(500, 64))},
    "decoder": {"h": second_moments(correlated(500, 64, seed=1))},
}
RECIPE = Recipe.of("int4", method="descent")


def models() -> dict[str, ir.Model]:
    return {"encoder": parsed(ENCODER, shared=TABLE, w=WEIGHT), "decoder": parsed(DECODER, table=TABLE.copy())}


def test_a_linear_weight_is_rounded_by_what_its_product_reads() -> None:
    blocks = Rounder(SEEN).blocks(models(), RECIPE)["encoder"]["w"]
    assert (blocks.codes == descended(WEIGHT, SEEN["encoder"]["h"], RECIPE.scheme).codes).all()


def test_a_table_is_rounded_by_what_the_head_reads_in_every_graph() -> None:
    """Whatever it is called there; the embedding's use of it counts as half the mean second moment for each number."""
    blocks = Rounder(SEEN).blocks(models(), RECIPE)
    want = descended(TABLE.T, damped(SEEN["decoder"]["h"], LOOKED_UP), RECIPE.scheme)
    for one in (blocks["encoder"]["shared"], blocks["decoder"]["table"]):
        assert (one.codes == want.codes).all()
        assert (one.scales == want.scales).all()


@pytest.mark.parametrize("method", ["descent", "gptq", "clip"])
def test_a_table_of_no_head_is_rounded_without_data(method: str) -> None:
    encoder = {"encoder": models()["encoder"]}
    blocks = Rounder(SEEN).blocks(encoder, Recipe.of("int4", method=method))["encoder"]["shared"]
    assert (blocks.codes == clip(TABLE.T, RECIPE.scheme).codes).all()


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_methods_that_look_at_no_data_need_none(method: str) -> None:
    recipe = Recipe.of("int4", method=method)
    blocks = Rounder({}).blocks(models(), recipe)["decoder"]["table"]
    assert (blocks.codes == quantize(TABLE.T, recipe.scheme, Method(method)).codes).all()


def test_what_was_rounded_is_not_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rounder = Rounder(SEEN)
    before = rounder.blocks(models(), RECIPE)
    rounded: list[str] = []

    def note(*given: object, name: str, **named: object) -> object:
        rounded.append(name)
        return quantize(*given, name=name, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("txopt.calibration.rounder.quantize", note)
    finer = Recipe(scheme=RECIPE.scheme, method=RECIPE.method, finer=frozenset({"w"}))
    after = rounder.blocks(models(), finer)
    assert rounded == ["w"]
    assert after["encoder"]["w"].scheme.bits == 8
    assert after["decoder"]["table"] is before["decoder"]["table"]


def test_weights_of_the_same_name_in_two_graphs_are_two() -> None:
    twice = {
        name: parsed(ENCODER, shared=TABLE, w=weight) for name, weight in (("encoder", WEIGHT), ("decoder", -WEIGHT))
    }
    seen = dict.fromkeys(twice, SEEN["encoder"])
    blocks = Rounder(seen).blocks(twice, Recipe.of("int4", method="gptq"))
    assert not np.array_equal(blocks["encoder"]["w"].codes, blocks["decoder"]["w"].codes)
