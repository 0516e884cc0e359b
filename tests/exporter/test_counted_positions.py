"""Positions that count the tokens that are no padding, as fairseq, M2M100 and XLM-R have them: derived, or refused in plain words."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.exporter.cacheless import LONGEST, WIDTH, Learned
from tests.exporter.test_incremental import check_greedy
from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model


class Embedding(nn.Module):
    """Tokens at their counted places, as fairseq counts them: from the padding id on, which is where padding stands."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.tokens, self.places, self.padding = nn.Embedding(40, WIDTH), nn.Embedding(LONGEST + 1, WIDTH), padding

    def forward(self, ids: Tensor) -> Tensor:
        kept = self.kept(ids)
        return self.tokens(ids) + self.places(self.count(kept))

    def kept(self, ids: Tensor) -> Tensor:
        return ids != self.padding

    def count(self, kept: Tensor) -> Tensor:
        return kept.int().cumsum(1) * kept + self.padding


class ByWhere(Embedding):
    def count(self, kept: Tensor) -> Tensor:
        return torch.where(kept, kept.long().cumsum(1), self.padding)


class Above(Embedding):
    def kept(self, ids: Tensor) -> Tensor:
        return ids > self.padding


class Counted(Learned):
    embedding: type[Embedding] = Embedding

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.embedding(self.special_ids["pad_token_id"])  # type: ignore[assignment]

    def placed(self, x: Tensor) -> Tensor:
        return x


class CountedByWhere(Counted):
    embedding = ByWhere


@pytest.mark.parametrize("kind", [Counted, CountedByWhere])
def test_positions_that_count_what_is_no_padding_are_those_of_the_tokens(kind: type[Counted], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    nn.init.constant_(module.head.bias[:1], -20.0)  # as training does: padding is not said
    artifact = export(module, tmp_path / "out")
    assert "CumSum" not in artifact.manifest.fusion["decoder"]["nodes"]
    check_greedy(module, Model(artifact))


class SaysPadding(Counted):
    """Its own answers hold the padding id in the middle, behind which it counts on."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return torch.cat([logits[..., :1] + 2, logits[..., 1:]], -1)


class CountedAbove(Counted):
    embedding = Above


class PaddedStart(Counted):
    """The first token of every target is the padding id, and no position is counted for it."""

    special_ids: ClassVar = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}


COUNTED = "step by step; positions that are counted follow from what the row's earlier tokens are"
REFUSED = {
    SaysPadding: "node ne (ne in tokens) asks which tokens of the target are padding (id 0), and decode() says that id itself",
    CountedAbove: COUNTED,
    PaddedStart: COUNTED,
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_positions_that_follow_from_the_tokens_are_refused(kind: type[Counted], tmp_path: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(SourceError, match=re.escape(REFUSED[kind])):
        export(kind().eval(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
