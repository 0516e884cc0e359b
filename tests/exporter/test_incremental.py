"""Decoders written without a cache: derived, verified against the full sequence, or refused by the node that stands in the way."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.exporter.cacheless import BAD, GOOD, Learned, Relative, WithoutSoftmax
from txopt.exporter.pipeline import MOST_MOVED, export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_a_decoder_without_a_cache_gets_one(kind: type[Learned], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    artifact = export(module, tmp_path / "out")
    assert artifact.manifest.parity["passed"]
    assert artifact.manifest.cache is not None
    nodes = artifact.manifest.fusion["decoder"]["nodes"]
    assert nodes["TensorScatter"] == 2 * artifact.manifest.cache.layers
    assert nodes["Attention"] == 2 * artifact.manifest.cache.layers
    assert "Softmax" not in nodes
    check_greedy(module, Model(artifact))


def check_greedy(module: Any, model: Model) -> None:
    """The ids of 64 steps, against running the full sequence again for each."""
    source, mask = np.array([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]]), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "num_beams": 1}
    got = model.generate(input_ids=source, attention_mask=mask, **options).sequences
    ids = torch.full((2, 1), 1)
    with torch.no_grad():
        memory = module.encode(torch.from_numpy(source), torch.from_numpy(mask))
        for _ in range(64):
            logits = module.decode(ids, memory, torch.from_numpy(mask))[:, -1]
            logits[:, 2] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    np.testing.assert_array_equal(got, ids.numpy())


class MeanOfTheBatch(Learned):
    """An encoder whose rows hear each other: copies of a row would not show it, for they have its own mean."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        memory = super().encode(input_ids, attention_mask)
        return 10 * (memory - memory.mean((0, 1), keepdim=True))


def test_rows_that_hear_each_other_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    artifact = export(MeanOfTheBatch().eval(), tmp_path / "out")
    assert artifact.manifest.parity["invariance"]["batch"] > MOST_MOVED
    assert "what a row says depends on its batch" in caplog.text


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
def test_what_cannot_run_token_by_token_is_named(kind: type[Learned], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape(BAD[kind])):
        export(kind(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scores_without_a_softmax_are_not_told_with_that_of_an_attention_beside_them(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"node mul \(mul\) relates positions .* by node tril \(tril\)$"):
        export(WithoutSoftmax(), tmp_path / "out")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_has_tables_of_its_own(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert export(Relative(), tmp_path / "out", precision=precision).manifest.parity["passed"]


def test_weights_are_stored_once(tmp_path: Path) -> None:
    module = Learned()
    artifact = export(module, tmp_path / "out")
    numbers = sum(value.numel() for value in module.parameters())
    assert artifact.manifest.files["weights.data"].size < 4 * numbers * 1.05 + 4096 * 40
