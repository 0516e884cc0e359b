"""What the code of a custom module does wrong is told as such: the exception with its own file and line, or what it gave instead."""

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.exporter.cacheless import Learned
from tests.exporter.test_custom import Tiny
from txopt.exporter import reference
from txopt.exporter.custom import DecodeCache
from txopt.exporter.custom_source import open_module
from txopt.exporter.trace import trace
from txopt.runtime.errors import SourceError

# Every line that raises below ends in this mark.
MARK = "# raises"


def refused(module: Any) -> str:
    """What is said of ``module``, by whichever stage refuses it; nothing is written."""
    with pytest.raises(SourceError) as caught:
        opened_recorded_traced(module)
    return str(caught.value)


def opened_recorded_traced(module: Any) -> None:
    source = open_module(module)
    reference.record(source)
    trace(source, torch.float32)


def marked(said: str) -> bool:
    """Whether the first line that ``said`` names is one that raises."""
    found = re.search(r"\((\S+\.py), line (\d+)\)", said)
    assert found is not None, said
    return linecache.getline(str(Path(found[1]).absolute()), int(found[2])).rstrip().endswith(MARK)


class Attribute(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        return self.not_there(tokens)  # type: ignore[no-any-return,operator]  # raises


class Key(Tiny):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return {}["layers"]  # type: ignore[no-any-return,typeddict-item]  # raises


class InTorch(Tiny):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.cat([super().encode(input_ids, attention_mask), self.head.weight])  # raises


class Leaving(Tiny):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raise SystemExit(5)  # raises


class OfTheCache(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: Any) -> Tensor:
        return cache.logits(tokens)  # type: ignore[no-any-return]  # raises


class ById(Tiny):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if input_ids.max() == 19:
            raise KeyError(19)  # raises
        return super().encode(input_ids, attention_mask)


class LongSources(Tiny):
    """Fails for sources that no trial has."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if input_ids.shape[1] > 4:
            raise KeyError("positions")  # raises
        return super().encode(input_ids, attention_mask)


class OneRow(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        if tokens.shape[0] > 1:
            raise KeyError("rows")  # raises
        return super().decode(tokens, memory, cache)


class OnlyFull(Tiny):
    """Knows the training's cache and no other."""

    def decode(self, tokens: Tensor, memory: Tensor, cache: Any) -> Tensor:
        cache._sources  # noqa: B018  # raises
        return super().decode(tokens, memory, cache)


class Branching(Tiny):
    def embed(self, ids: Tensor) -> Tensor:
        if ids.sum() > 3:  # raises
            return super().embed(ids)
        return super().embed(ids) * 2


class Property(Tiny):
    @property
    def special_ids(self) -> Any:  # type: ignore[override]
        return self.configuration["ids"]  # type: ignore[index]  # raises


class AttributeAtOnce(Learned):
    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        return self.not_there(tokens)  # type: ignore[no-any-return,operator]  # raises


class KeyAtOnce(Learned):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return {}["layers"]  # type: ignore[no-any-return,typeddict-item]  # raises


class InTorchAtOnce(Learned):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) @ self.q.weight  # raises


class BranchingAtOnce(Learned):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x if x.sum() > 0 else -x)  # raises


class OneToken(Learned):
    def placed(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise KeyError("no cache")  # raises
        return super().placed(x)


# the class, and what must be said beside the line
RAISING: dict[type[nn.Module], tuple[str, ...]] = {
    Attribute: ("a trial call failed", "AttributeError: 'Attribute' object has no attribute 'not_there'"),
    Key: ("a trial call failed", "KeyError: 'layers'"),
    InTorch: ("a trial call failed", "RuntimeError"),
    Leaving: ("a trial call failed", "SystemExit: 5"),
    OfTheCache: ("a trial call failed", "AttributeError", "self_attention"),
    ById: ("source_vocabulary = 20", "id 19 fails: KeyError: 19"),
    LongSources: ("encode() and decode() fail for input_ids [1,", "KeyError: 'positions'", "any number of rows"),
    OneRow: ("encode() and decode() fail for input_ids [", "KeyError: 'rows'", "any number of rows"),
    OnlyFull: ("AttributeError: 'CrossCollector' object has no attribute '_sources'", "self_attention"),
    Branching: ("torch cannot trace this model to encoder.onnx", "control flow"),
    Property: ("special_ids", "AttributeError: 'Property' object has no attribute 'configuration'"),
    AttributeAtOnce: ("decode(tokens, memory, memory_mask) fails for tokens [2,5]", "has no attribute 'not_there'"),
    KeyAtOnce: ("encode() fails for input_ids [2,7], attention_mask [2,7]", "KeyError: 'layers'"),
    InTorchAtOnce: ("decode(tokens, memory, memory_mask) fails for tokens [2,5]", "RuntimeError"),
    BranchingAtOnce: ("cannot be made a graph", "control flow"),
    OneToken: ("fails for 1 of at most 80 tokens: KeyError: 'no cache'",),
}


@pytest.mark.parametrize("kind", RAISING, ids=lambda kind: kind.__name__)
def test_an_exception_in_their_own_code_is_told_with_its_line(kind: type[nn.Module]) -> None:
    said = refused(kind())
    assert marked(said), said
    missing = [part for part in RAISING[kind] if part not in said]
    assert not missing, said
    if kind not in (Branching, BranchingAtOnce):
        assert "control flow" not in said, "that is not what went wrong"


def returning(base: type[Any], part: str, change: Callable[[Tensor], Any]) -> Any:
    """``base`` whose ``part`` returns something else."""

    class Returning(base):
        def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            found = super().encode(input_ids, attention_mask)
            return change(found) if part == "encode" else found

    class AtOnce(Returning):
        def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Any:
            found = super().decode(tokens, memory, memory_mask)
            return change(found) if part == "decode" else found

    class Cached(Returning):
        def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Any:
            found = super().decode(tokens, memory, cache)
            return change(found) if part == "decode" else found

    return (Cached if base is Tiny else AtOnce)()


RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda x: None, "got None (has it a return?)"),
    "a dict": (lambda x: {"states": x}, "got a dict with states; return the tensor alone"),
    "an object": (lambda x: SimpleNamespace(states=x), "got a SimpleNamespace; return the tensor alone"),
    "an array": (lambda x: np.zeros(x.shape), "got a ndarray; return the tensor alone"),
    "two axes": (lambda x: x[:, 0], "got [{rows},"),
    "four axes": (lambda x: x[None], "got [1,{rows},"),
    "the last place": (lambda x: x[:, -1:], "got [{rows},1,"),
}
# Memories may be several.
LOGITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a pair": (lambda x: (x, None), "got a tuple of 2; return the tensor alone"),
    "one in a tuple": (lambda x: (x,), "got a tuple of 1; return the tensor alone"),
    "one in a list": (lambda x: [x], "got a list of 1; return the tensor alone"),
    "an empty tuple": (lambda x: (), "got a tuple of 0; return the tensor alone"),
}
CASES = [*(("encode", what) for what in RETURNS), *(("decode", what) for what in (RETURNS | LOGITS))]


@pytest.mark.parametrize(("part", "what"), CASES)
@pytest.mark.parametrize("base", [Tiny, Learned])
def test_what_is_returned_instead_of_a_tensor_is_told(base: type[nn.Module], part: str, what: str) -> None:
    change, expected = (RETURNS | LOGITS)[what]
    said = refused(returning(base, part, change))
    assert expected.format(rows=1 if base is Tiny else 2) in said, said
    assert f"{part}() must return {'logits' if part == 'decode' else 'a tensor'}" in said, said


@pytest.mark.parametrize("base", [Tiny, Learned])
def test_a_memory_in_a_tuple_arrives_in_one(base: type[nn.Module]) -> None:
    said = refused(returning(base, "encode", lambda x: (x,)))
    assert "encode() returns a tuple, so decode() is given one" in said


class BrokenWeight(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight.data[3] = torch.nan


class BrokenWeightAtOnce(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.tokens.weight.data[11:] = torch.nan


class DividingByPadding(Tiny):
    """NaN where a source is padded, which self-attention carries on."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().encode(input_ids, attention_mask) / attention_mask[..., None]


class LongIsEndless(Tiny):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().encode(input_ids, attention_mask) + torch.zeros(()).log().mul(input_ids.shape[1] > 4)


class Endless(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        return super().decode(tokens, memory, cache) * torch.inf


class NaNAtOnce(Learned):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().encode(input_ids, attention_mask) * torch.nan


class Forbidding(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        return super().decode(tokens, memory, cache).masked_fill(torch.arange(20) == 7, -torch.inf)


NOT_FINITE: dict[type[nn.Module], tuple[str, ...]] = {
    BrokenWeight: ("NaN in logits", "weights that hold NaN or infinity: head.weight; load or train them again"),
    BrokenWeightAtOnce: ("NaN in memory", "weights that hold NaN or infinity: tokens.weight"),
    DividingByPadding: ('case "padded"', "all weights are finite", "a division by zero"),
    LongIsEndless: ("-inf in memory", "input_ids [1,", "all weights are finite", "a division by zero"),
    Endless: ("in logits", "all weights are finite"),
    NaNAtOnce: ("NaN in memory", "all weights are finite"),
    Forbidding: ("-inf in logits", "at id 7", "suppress_tokens"),
}


@pytest.mark.parametrize("kind", NOT_FINITE, ids=lambda kind: kind.__name__)
def test_answers_that_are_not_finite_are_told_before_anything_is_compared(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    said = refused(kind())
    missing = [part for part in ("the model's own answers are not finite", *NOT_FINITE[kind]) if part not in said]
    assert not missing, said
