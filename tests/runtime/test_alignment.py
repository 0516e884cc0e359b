"""Sources padded to whole lanes: which axes, how far, and with what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.artifacts import tensor
from txopt.runtime.alignment import LANES, aligned, cut, source_lengths, whole
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.inputs import Bound

IDS, MASK = tensor("input_ids", "int64", "B", "T"), tensor("attention_mask", "int64", "B", "T")
OUT = (tensor("memory", "float32", "B", "T", 8),)


def spec(*inputs: object) -> GraphSpec:
    return GraphSpec(file="encoder.onnx", inputs=inputs, outputs=OUT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [(1, None, 8), (8, None, 8), (9, None, 16), (9, 16, 16), (9, 12, 12), (16, 12, 12), (12, 12, 12), (1, 4, 4)],
)
def test_lengths_become_whole_lanes_or_all_there_is(length: int, most: int | None, expected: int) -> None:
    assert whole(length, most) == expected


@given(length=st.integers(1, 500), most=st.none() | st.integers(1, 500))
def test_lengths_grow_and_by_less_than_a_lane(length: int, most: int | None) -> None:
    found = whole(length, most)
    if most is None or length <= most:
        assert length <= found < length + LANES
        assert found % LANES == 0 or found == most
        assert whole(found, most) == found


def test_what_is_added_is_masked() -> None:
    ids = np.array([[5, 6, 7], [8, 0, 0]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    found = aligned(spec(IDS, MASK), {"input_ids": ids, "attention_mask": mask}, {"attention_mask": "T"}, {})
    np.testing.assert_array_equal(found["input_ids"], np.pad(ids, ((0, 0), (0, 5))))
    np.testing.assert_array_equal(found["attention_mask"], np.pad(mask, ((0, 0), (0, 5))))
    assert found["input_ids"].dtype == np.int64


def test_whole_lengths_are_not_copied() -> None:
    feeds = {"input_ids": np.ones((2, 16), np.int64), "attention_mask": np.ones((2, 16), np.int64)}
    found = aligned(spec(IDS, MASK), feeds, {"attention_mask": "T"}, {})
    assert found["input_ids"] is feeds["input_ids"]


def test_positions_that_a_model_has_are_not_exceeded() -> None:
    """Of the inputs of one axis the one with the fewest positions says how far."""
    feeds = {name: np.ones((1, 9), np.int64) for name in ("input_ids", "attention_mask", "tags")}
    inputs = spec(IDS, MASK, tensor("tags", "int64", "B", "T"))
    bounds = {"input_ids": Bound(positions=14), "tags": Bound(positions=11, vocabulary=3)}
    found = aligned(inputs, feeds, {"attention_mask": "T"}, bounds)
    assert {value.shape for value in found.values()} == {(1, 11)}


def test_every_memory_has_a_length_of_its_own() -> None:
    """Features are padded along their length alone; axes without a mask and fixed ones stay."""
    inputs = spec(
        IDS,
        MASK,
        tensor("regions", "float32", "B", "U", 12),
        tensor("regions_mask", "int64", "B", "U"),
        tensor("pixels", "float32", "B", 5, 12),
        tensor("pixels_mask", "int64", "B", 5),
        tensor("free", "float32", "B", "W", 12),
    )
    feeds = {
        "input_ids": np.ones((2, 3), np.int64),
        "attention_mask": np.ones((2, 3), np.int64),
        "regions": np.ones((2, 17, 12), np.float32),
        "regions_mask": np.ones((2, 17), np.int64),
        "pixels": np.ones((2, 5, 12), np.float32),
        "pixels_mask": np.ones((2, 5), np.int64),
        "free": np.ones((2, 3, 12), np.float32),
    }
    masks: dict[str, str | int] = {"attention_mask": "T", "regions_mask": "U", "pixels_mask": 5}
    found = aligned(inputs, feeds, masks, {})
    assert {name: value.shape for name, value in found.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "regions": (2, 24, 12),
        "regions_mask": (2, 24),
        "pixels": (2, 5, 12),
        "pixels_mask": (2, 5),
        "free": (2, 3, 12),
    }
    assert not found["regions"][:, 17:].any()
    assert found["regions"].dtype == np.float32


def test_samples_of_sound_stay_as_they_are() -> None:
    """Their frames, not they, are what is attended to; and some encoders hear silence that is added."""
    inputs = spec(tensor("input_values", "float32", "B", "N"), tensor("attention_mask", "int64", "B", "N"))
    feeds = {"input_values": np.ones((1, 401), np.float32), "attention_mask": np.ones((1, 401), np.int64)}
    found = aligned(inputs, feeds, {"attention_mask": "N"}, {})
    assert {value.shape for value in found.values()} == {(1, 401)}


def test_what_was_added_is_taken_away_again() -> None:
    """Of every output as long as a source, whatever else it has; a copy, for the engine takes its memory back."""
    lengths = source_lengths({"input_ids": np.ones((2, 5)), "attention_mask": np.ones((2, 5))}, {"attention_mask": "T"})
    assert lengths == {"T": 5}
    value = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    shorter = cut(("B", "T", 3), value, lengths)
    np.testing.assert_array_equal(shorter, value[:, :5])
    assert shorter.base is None
    np.testing.assert_array_equal(cut(("B", 8, 3), value, lengths), value)
