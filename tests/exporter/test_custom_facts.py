"""What a module of one's own says of itself: taken as docs/custom-models.md says, or refused with what was expected and found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.exporter.cacheless import Learned
from tests.exporter.test_custom import Tiny, merge, split
from txopt.exporter import custom_facts
from txopt.exporter.custom import DecodeCache
from txopt.exporter.custom_source import CustomSource, open_module
from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model

IDS: dict[str, Any] = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def saying(base: type[nn.Module] = Tiny, **facts: Any) -> Any:
    """``base`` with other facts; ids are added to the usual ones."""
    ids = {name: facts.pop(name) for name in IDS if name in facts}
    return type("Saying", (base,), {**facts, "special_ids": {**IDS, **ids}})()


# what is said, and what the one message must name
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no end": ({"eos_token_id": []}, ("special_ids['eos_token_id']", "or a list of them", "got []")),
    "the end as text": ({"eos_token_id": "2"}, ("special_ids['eos_token_id']", "or a list of them", "got '2'")),
    "text among the ends": ({"eos_token_id": [2, "3"]}, ("special_ids['eos_token_id']", "got [2, '3']")),
    "no padding": ({"pad_token_id": None}, ("special_ids['pad_token_id']", "got None", "the end of sequence's")),
    "padding as text": ({"pad_token_id": "<pad>"}, ("special_ids['pad_token_id']", "got '<pad>'", "token's id")),
    "negative padding": ({"pad_token_id": -1}, ("special_ids['pad_token_id']", "at least 0", "got -1")),
    "padding as a truth value": ({"pad_token_id": True}, ("special_ids['pad_token_id']", "got True")),
    "padding as a tensor": ({"pad_token_id": torch.tensor(0)}, ("special_ids['pad_token_id']", "got tensor(0)")),
    "two starts": ({"decoder_start_token_id": [1, 2]}, ("special_ids['decoder_start_token_id']", "got [1, 2]")),
    "three at once": (
        {"eos_token_id": None, "pad_token_id": "0", "source_vocabulary": 0},
        ("special_ids['eos_token_id']", "special_ids['pad_token_id']", "source_vocabulary"),
    ),
    "no source ids": ({"source_vocabulary": 0}, ("source_vocabulary", "at least 1", "got 0")),
    "negative source ids": ({"source_vocabulary": -3}, ("source_vocabulary", "at least 1", "got -3")),
    "source ids as text": ({"source_vocabulary": "20"}, ("source_vocabulary", "whole number", "got '20'")),
    "source ids as a fraction": ({"source_vocabulary": 20.0}, ("source_vocabulary", "whole number", "got 20.0")),
    "no source positions": ({"max_source_length": 0}, ("max_source_length", "at least 2", "got 0")),
    "source positions as text": ({"max_source_length": "9"}, ("max_source_length", "got '9'")),
}


@pytest.mark.parametrize("base", [Tiny, Learned])
@pytest.mark.parametrize("what", WRONG)
def test_facts_of_another_type_are_told(what: str, base: type[nn.Module]) -> None:
    facts, said = WRONG[what]
    with pytest.raises(SourceError) as caught:
        open_module(saying(base, **facts))
    missing = [part for part in said if part not in str(caught.value)]
    assert not missing, str(caught.value)


# facts of the right type that are not true, and what is said once the module has been called
UNTRUE: dict[str, tuple[dict[str, Any], str]] = {
    "an end that is no logit": ({"eos_token_id": [2, 90]}, "names 90: expected ids below"),
    "a start that is no token": ({"decoder_start_token_id": 90}, "a trial call failed.*id 90.*IndexError"),
    "padding that is no token": ({"pad_token_id": 90}, r"special_ids\['pad_token_id'\] = 90.*IndexError"),
    "more source ids than encode takes": ({"source_vocabulary": 90}, "source_vocabulary = 90.*id 89 fails: IndexError"),
}


@pytest.mark.parametrize("base", [Tiny, Learned])
@pytest.mark.parametrize("what", UNTRUE)
def test_facts_that_are_not_true_are_told(what: str, base: type[nn.Module]) -> None:
    facts, said = UNTRUE[what]
    with pytest.raises(SourceError, match=said):
        open_module(saying(base, **facts))


def test_ids_that_are_all_special_are_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"all of 3 ids are special.*source_vocabulary"):
        export(saying(source_vocabulary=3), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_target_may_have_ids_that_the_source_lacks() -> None:
    class Wide(Tiny):
        special_ids = {**IDS, "eos_token_id": 19}  # noqa: RUF012

        def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            assert int(input_ids.max()) < 7
            return super().encode(input_ids, attention_mask)

        source_vocabulary = 7

    assert CustomSource(Wide()).facts.source_vocabulary == 7


@pytest.mark.parametrize("base", [Tiny, Learned])
def test_several_ends_of_sequence_all_end_it(base: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, mask = np.array([[3, 4, 5, 6], [7, 8, 9, 10]]), np.ones((2, 4), np.int64)
    feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 1}
    torch.manual_seed(0)
    free = open_module(saying(base)).generate(feeds, **options)
    assert free is not None
    third, second = int(free.ids[0, 3]), int(free.ids[1, 2])  # what each row says there ends it from now on
    torch.manual_seed(0)
    module = saying(base, eos_token_id=[third, second])
    artifact = export(module, tmp_path / "out")
    assert artifact.manifest.generation["eos_token_id"] == [third, second]
    expected = open_module(module).generate(feeds, **options)
    assert expected is not None
    assert expected.ids.shape[1] < free.ids.shape[1]
    got = Model(artifact).generate(input_ids=ids, attention_mask=mask, **options).sequences
    np.testing.assert_array_equal(got, expected.ids.numpy())


def test_least_lengths_hold_all_ends_back() -> None:
    module = saying(eos_token_id=list(range(2, 20)))
    feeds = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 1]])}
    found = CustomSource(module).generate(feeds, max_new_tokens=6, min_new_tokens=4)
    assert found is not None
    assert int(found.ids[0, 1:5].max()) < 2


class Twice(Tiny):
    """The same self-attention layer number for two attentions."""

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        x = self.embed(tokens) + self.places(cache.positions)
        for _ in range(2):
            x = x + merge(cache.self_attention(0, *(split(part(x)) for part in (self.q, self.k, self.v))))
        x = x + merge(
            cache.cross_attention(0, split(self.q(x)), lambda: (split(self.k(memory)), split(self.v(memory))))
        )
        logits: Tensor = self.head(x)
        return logits


class CrossTwice(Tiny):
    """The same cross-attention layer number for two attentions."""

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        x = self.embed(tokens) + self.places(cache.positions)
        x = x + merge(cache.self_attention(0, *(split(part(x)) for part in (self.q, self.k, self.v))))
        for _ in range(2):
            x = x + merge(
                cache.cross_attention(0, split(self.q(x)), lambda: (split(self.k(memory)), split(self.v(memory))))
            )
        logits: Tensor = self.head(x)
        return logits


class WithoutCross(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        x = self.embed(tokens)
        logits: Tensor = self.head(
            merge(cache.self_attention(0, *(split(part(x)) for part in (self.q, self.k, self.v))))
        )
        return logits


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Twice, "self-attention of layer 0 again, after 1 layers: number them 0, 1"),
        (CrossTwice, "cross-attention of layer 0 again, after 1 layers: number them 0, 1"),
        (WithoutCross, r"no cross-attention of its cache: .*cache\.cross_attention"),
    ],
)
def test_attentions_that_a_cache_cannot_keep_are_told(kind: type[Tiny], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        CustomSource(kind())


def test_facts_are_read_as_the_manifest_keeps_them() -> None:
    facts = custom_facts.read(saying(eos_token_id=(2, 3), max_source_length=9))
    assert facts.special_ids == {**IDS, "eos_token_id": [2, 3]}
    assert (facts.limit, facts.source_limit, facts.source_vocabulary, facts.eos_ids) == (40, 9, 20, [2, 3])


@pytest.mark.parametrize("limit", [2, 5])
def test_a_decoder_without_a_cache_may_take_short_sources(limit: int, tmp_path: Path) -> None:
    class Short(Learned):
        max_source_length = limit

        def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (
                super().encode(input_ids, attention_mask) + self.places.weight[:limit][torch.arange(input_ids.shape[1])]
            )

    torch.manual_seed(0)
    assert export(Short(), tmp_path / "out").manifest.parity["passed"]
