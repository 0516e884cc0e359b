"""Buffers and feeds: what a session promises whatever the caller does with its arrays."""

import gc

import numpy as np
import pytest

from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.model import Model


@pytest.fixture(scope="module")
def model(g2p: Artifact) -> Model:
    return Model(g2p, threads=1)


def test_a_bound_call_keeps_its_arrays_alive(g2p: Artifact, model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 6, 7, 2]]))
    spec = g2p.manifest.graphs["decoder"]
    runner = Runner(g2p.file(spec.file), threads=1)
    cache = g2p.manifest.cache
    assert cache is not None
    shape = (1, cache.heads, 8, cache.head_size)
    logits = np.zeros((1, 1, int(spec.outputs[0].axes[-1])), np.float32)

    def bound():  # type: ignore[no-untyped-def]
        """Every array but the logits belongs to this frame alone."""
        buffers = {name: runner.zeros(shape, cache.dtype) for name in model.decode(encoded).names}
        fixed = {name: value for name, value in encoded.values.items() if name.startswith("cross_")}
        feeds = {
            "input_ids": np.array([[1]]),
            "position": np.array([0]),
            "encoder_attention_mask": np.ones((1, 4), np.int64),
        }
        inputs = {**{name: runner.tensor(array) for name, array in feeds.items()}, **fixed, **buffers}
        presents = {name.replace("self_", "present_"): value for name, value in buffers.items()}
        return runner.bind(inputs, {"logits": runner.tensor(logits), **presents})

    call = bound()
    gc.collect()
    trash = [np.full(shape, np.nan, np.float32) for _ in range(64)] + [np.full((1, 1), 10**9) for _ in range(64)]
    call.run()
    expected = model.decode(encoded).feed(np.array([[1]]))
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert trash


def test_strided_tokens_are_fed_as_they_are(model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 6, 7, 2]]))
    tokens = np.array([[1, 9, 10, 11, 12, 13]])
    whole = model.decode(encoded).feed(tokens)
    decoder = model.decode(encoded)
    parts = [decoder.feed(tokens[:, start : start + 2]) for start in (0, 2, 4)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_reorder_lets_rows_go_on_as_others(model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 6, 7, 2]]))
    decoder = model.decode(encoded, beams=3)
    decoder.feed(np.array([[1, 9], [1, 10], [1, 11]]))
    decoder.reorder(np.array([2, 2, 0]))
    logits = decoder.step(np.array([20, 21, 20])).copy()
    for row, (prefix, last) in enumerate([(11, 20), (11, 21), (9, 20)]):
        alone = model.decode(encoded).feed(np.array([[1, prefix, last]]))[0, -1]
        np.testing.assert_allclose(logits[row], alone, atol=1e-5)


def test_wrong_inputs_are_all_named(model: Model) -> None:
    with pytest.raises(
        InputError, match=r"(?s)attention_mask: expected int64.*foo: unknown|foo: unknown.*attention_mask: expected"
    ):
        model.encode(input_ids=np.ones((1, 3), np.int64), attention_mask=np.ones((2, 3), np.int64), foo=np.ones(1))
    with pytest.raises(InputError, match="at least 0, got -1"):
        model.encode(input_ids=np.array([[1, -1]]))
    with pytest.raises(InputError, match="engine refused"):
        model.encode(input_ids=np.array([[1, 500]]))


def test_more_tokens_than_positions_are_refused(model: Model) -> None:
    decoder = model.decode(model.encode(input_ids=np.array([[5, 2]])))
    with pytest.raises(InputError, match="64 target positions, asked for 65"):
        decoder.feed(np.ones((1, 65), np.int64))


def test_threads_and_devices_are_checked(g2p: Artifact) -> None:
    with pytest.raises(UsageError, match="threads"):
        Model(g2p, threads=0)
    with pytest.raises(UsageError, match="device"):
        Model(g2p, device="tpu")
