"""Buffers and feeds: what a session promises whatever the caller does with its arrays."""

import gc

import numpy as np
import pytest

from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.model import Model


@pytest.fixture(scope="module")
def model(g2p: Artifact) -> Model:
    return Model(g2p, threads=1)


def test_arrays_outlive_the_engine_values_they_came_from(model: Model) -> None:
    """The engine's own view of a value is dead memory once the value is gone; whoever asks for an array gets a copy."""
    ids = np.array([[5, 6, 7, 2]])
    encoded = model.encode(input_ids=ids)
    decoder = model.decode(encoded)
    decoder.feed(np.array([[1, 9]]))
    arrays = [model.session.array(encoded.values["memory"]), decoder.cached("self_key.0")]
    before = [array.copy() for array in arrays]
    assert all(array.base is None for array in arrays)
    del encoded, decoder
    gc.collect()
    again = model.encode(input_ids=ids[:, ::-1].copy())  # takes the memory that was freed
    model.decode(again).feed(np.array([[1, 20]]))
    for array, value in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, value)


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
