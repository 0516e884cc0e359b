"""LED's windows and its tokens of global attention, on sources of many windows, as transformers has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LEDForConditionalGeneration

from txopt.benchmarks.inputs import draw
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model

Artifacts = Callable[[str], Artifact]
Make = Callable[[str], Path]
LENGTHS = np.array([45, 30, 1])

# Which tokens are global, by row: none, the first as LED's authors advise, several and other ones in every row, padding too.
GLOBAL: dict[str, Any] = {
    "none": lambda place: np.zeros((3, 45), bool),
    "first": lambda place: np.repeat(place == 0, 3, 0),
    "several": lambda place: np.concatenate([place % 7 == 3, place > 27, place == 9]),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_memory_and_ids_are_those_of_transformers(name: str, artifacts: Artifacts, checkpoints: Make) -> None:
    place = np.arange(45)[None]
    mask = (place < LENGTHS[:, None]).astype(np.int64)
    ids = np.where(mask == 1, np.random.default_rng(3).integers(5, 90, mask.shape), 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": GLOBAL[name](place).astype(np.int64)}
    reference = LEDForConditionalGeneration.from_pretrained(checkpoints("led")).eval()
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    with torch.no_grad():
        expected = reference.get_encoder()(**tensors)[0].numpy()
        sequences = reference.generate(**tensors, max_new_tokens=12, num_beams=3).numpy()
    model = Model(artifacts("led"))
    if name == "none":
        del inputs["global_attention_mask"]
    memory = model.session.array(model.encode(**inputs).values["memory"])
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(memory[row, :length], expected[row, :length], atol=1e-5)
    np.testing.assert_array_equal(model.generate(**inputs, max_new_tokens=12, num_beams=3).sequences, sequences)


def test_a_token_is_heard_as_far_as_the_windows_reach_and_everywhere_if_it_is_global(artifacts: Artifacts) -> None:
    """Two layers with windows of 4 and 2 to one side: a token that changes is felt 6 places away."""
    model = Model(artifacts("led"))
    ids = np.random.default_rng(4).integers(5, 90, (1, 40))
    changed = np.where(np.arange(40) == 20, 99, ids)

    def difference(marked: int | None) -> Any:
        mask = (np.arange(40) == marked).astype(np.int64)[None]
        before, after = (
            model.session.array(model.encode(input_ids=each, global_attention_mask=mask).values["memory"])
            for each in (ids, changed)
        )
        return np.flatnonzero(np.abs(before - after).max(-1)[0] > 1e-6)

    assert difference(None).tolist() == list(range(14, 27))
    assert difference(20).tolist() == list(range(40))
    assert difference(0).tolist() == list(range(40)), "the first token hears it, and all hear the first"


def test_a_benchmark_marks_no_token_as_global(artifacts: Artifacts) -> None:
    inputs = draw(artifacts("led"), 2, 9)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 9)
    assert not inputs["global_attention_mask"].any()
