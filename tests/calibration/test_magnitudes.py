"""Magnitudes taken inside a graph are those of numpy, and sums of magnitudes bound every partial sum."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import engine, parsed
from tests.calibration.made import normal
from txopt.calibration.data import read
from txopt.calibration.magnitudes import Magnitudes, magnitudes, watch
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model


def seen(model: ir.Model, **feeds: np.ndarray) -> Magnitudes:
    watched = watch(model)
    made = {value.name: value for node in model.graph for value in node.outputs}
    taps = list(dict.fromkeys(watched.taps))
    model.graph.outputs.extend(made[tap] for tap in taps)
    results = engine(model, **feeds)[-len(taps) :]
    return watched.read({tap: float(array[0]) for tap, array in zip(taps, results, strict=True)})


def test_every_float_value_is_seen_and_what_products_sum_on_their_way() -> None:
    x, w, b = normal(2, 3, 8), normal(8, 5, seed=1), normal(5, seed=2)
    found = seen(
        parsed("(float[2,3,8] x) => (float[2,3,5] y) { h = MatMul(x, w) s = Add(h, b) y = Relu(s) }", w=w, b=b), x=x
    )
    expected = {"x": x, "h": x @ w, "s": x @ w + b, "y": np.maximum(x @ w + b, 0)}
    assert found.values == pytest.approx({name: float(np.abs(value).max()) for name, value in expected.items()})
    assert found.sums == pytest.approx({"h": float((np.abs(x) @ np.abs(w)).max())})
    assert found.sums["h"] > found.values["h"]


def test_a_gemm_counts_its_bias() -> None:
    x, w, b = normal(2, 8), normal(5, 8, seed=1), -normal(5, seed=2)
    found = seen(parsed("(float[2,8] x) => (float[2,5] y) { y = Gemm<transB=1>(x, w, b) }", w=w, b=b), x=x)
    assert found.sums["y"] == pytest.approx(float((np.abs(x) @ np.abs(w).T + np.abs(b)).max()))


def test_fills_of_masks_are_left_out() -> None:
    text = "(float[2,4] x, bool[2,4] m) => (float[2,4] y) { f = Where(m, x, fill) y = Softmax(f) }"
    mask = np.array([[True, True, False, True]] * 2)
    found = seen(parsed(text, fill=np.array(-np.inf, np.float32)), x=normal(2, 4), m=mask)
    assert found.values["f"] == np.abs(normal(2, 4)[:, [0, 1, 3]]).max()


@pytest.mark.parametrize(("attributes", "scale"), [("", 0.25), ("<scale=1.0>", 1.0)])
def test_scores_of_attention_are_bounded(attributes: str, scale: float) -> None:
    q, k = normal(1, 2, 3, 16), normal(1, 2, 5, 16, seed=1)
    text = f"(float[1,2,3,16] q, float[1,2,5,16] k) => (float[1,2,3,16] y) {{ y = Attention{attributes}(q, k, k) }}"
    found = seen(parsed(text), q=q, k=k)
    longest = [float(np.linalg.norm(array, axis=-1).max()) for array in (q, k)]
    assert found.sums["y"] == pytest.approx(longest[0] * longest[1] * scale)
    assert found.sums["y"] >= np.abs(q @ k.transpose(0, 1, 3, 2)).max() * scale


def test_heads_that_are_joined_are_scaled_by_the_size_of_one() -> None:
    q = normal(1, 3, 32)
    text = "(float[1,3,32] q) => (float[1,3,32] y) { y = Attention<q_num_heads=2, kv_num_heads=2>(q, q, q) }"
    assert seen(parsed(text), q=q).sums["y"] == pytest.approx(float(np.linalg.norm(q, axis=-1).max() ** 2) / 4)


@pytest.mark.slow
def test_padding_counts(artifacts: Callable[[str], Artifact]) -> None:
    """A batch of a short source and a long one: infinity in a padded place would be NaN in all others."""
    artifact = artifacts("bart")
    model, sources = Model(artifact), [np.arange(3, 33), np.arange(3, 6)]
    samples = read(
        [
            {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None]), "labels": np.array([[5, 2]])}
            for ids in sources
        ],
        model,
    )
    found = magnitudes(artifact, samples)
    assert found.keys() == {"encoder", "decoder"}
    assert set(found["decoder"].sums) <= set(found["decoder"].values)
    ids = np.array([sources[0], np.pad(sources[1], (0, 27), constant_values=0)])
    mask = np.array([[1] * 30, [1] * 3 + [0] * 27])
    encoded = model.encode(input_ids=ids, attention_mask=mask)
    padded = 0
    for name, value in encoded.values.items():
        array = np.abs(model.session.array(value))
        assert found["encoder"].values[name] == pytest.approx(float(array.max()), rel=1e-4)
        places = array.swapaxes(1, array.ndim - 2)  # [B,T,...]
        padded += float(array.max()) > max(float(places[0].max()), float(places[1, :3].max()))
    assert padded, "padding was the largest nowhere: this test shows nothing"
