"""Anyone's own encoder-decoder (custom.py) as a ``Source``."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from txopt.exporter import custom_facts
from txopt.exporter.cache import CrossCollector, DecodeState
from txopt.exporter.custom import CrossKV, FullSequence, check_layer
from txopt.exporter.custom_facts import CustomFacts
from txopt.exporter.families.family import TEXT
from txopt.exporter.incremental import Incremental
from txopt.exporter.incremental_check import check
from txopt.exporter.precision import in_float32
from txopt.exporter.source import KV, Facts, Forward, Generated
from txopt.runtime.errors import SourceError, explain


class _Recording(FullSequence):
    """FullSequence that keeps what it saw, as reference for the caches."""

    def __init__(self, tokens: Tensor, attention_mask: Tensor) -> None:
        super().__init__(tokens, attention_mask)
        self.self_kv: list[KV] = []
        self.cross_kv: list[KV] = []

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        check_layer("self", layer, len(self.self_kv))
        self.self_kv.append((k, v))
        return super().self_attention(layer, q, k, v, bias=bias, scale=scale)

    def cross_attention(self, layer: int, q: Tensor, kv: CrossKV, *, scale: float | None = None) -> Tensor:
        check_layer("cross", layer, len(self.cross_kv))
        pair = kv()
        self.cross_kv.append(pair)
        return super().cross_attention(layer, q, lambda: pair, scale=scale)


class CustomSource:
    """See ``source.Source``; the module follows ``custom.CustomEncoderDecoder``."""

    def __init__(self, module: Any) -> None:
        found = custom_facts.read(module)
        self.module: Any = module.eval().requires_grad_(False)
        self.traced: Any = module
        self._eos = torch.tensor(found.eos_ids)
        self._width, vocabulary = _tried(module, found)
        self.facts = Facts(
            kind="encoder-decoder",
            task="text-to-text",
            family="custom",
            inputs=TEXT,
            generation={**found.special_ids, **({} if found.limit is None else {"max_length": found.limit})},
            vocabulary=vocabulary,
            source_vocabulary=found.source_vocabulary,
            limit=found.limit,
            source_limit=found.source_limit,
        )

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        memory = self.traced.encode(*inputs)
        start = torch.zeros(memory.shape[0], 1, dtype=torch.int64)
        collector = CrossCollector(start)
        self.traced.decode(start, memory, collector)
        return memory, *(x for pair in collector.cross_kv for x in pair)

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_mask: Tensor | None,
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        state = DecodeState(tokens, position, list(self_kv), list(cross_kv), source_mask)
        memory = torch.zeros(1, 1, self._width, dtype=cross_kv[0][0].dtype)  # its K/V are there already
        return self.traced.decode(tokens, memory, state).float(), state.self_kv

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        memory = self.module.encode(inputs["input_ids"], inputs["attention_mask"])
        cache = _Recording(tokens, inputs["attention_mask"])
        logits = self.module.decode(tokens, memory, cache)
        return Forward(memory, logits.float(), cache.self_kv, cache.cross_kv)

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise SourceError("a custom module is an encoder-decoder; encoders alone come from checkpoints")

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        """Greedy ids by the plainest loop there is; None for beams, which a custom module has no reference for."""
        if options.get("num_beams", 1) != 1:
            return None
        generation = self.facts.generation
        ids = torch.full((len(inputs["input_ids"]), 1), generation["decoder_start_token_id"])
        finished = torch.zeros(len(ids), dtype=torch.bool)
        for step in range(options["max_new_tokens"]):
            logits = self.forward(inputs, ids).logits[:, -1]
            if step < options.get("min_new_tokens", 0):
                logits[:, self._eos] = -torch.inf
            chosen = logits.argmax(-1)
            chosen[finished] = generation["pad_token_id"]
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            finished |= torch.isin(chosen, self._eos)
            if finished.all():
                break
        return Generated(ids)


class CachelessSource(CustomSource):
    """A module whose decode(tokens, memory, memory_mask) takes all tokens at once: its cache is derived (incremental.py).

    PyTorch's answers are the full sequence's own; the derived decoder has no say in them.
    """

    def __init__(self, module: Any) -> None:
        custom_facts.read(module)  # before its decode() is made a graph, whose errors would hide what is wrong here
        super().__init__(Incremental(module.eval().requires_grad_(False)))
        self._whole = module
        _tried_whole(module, self.facts)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])[:, : self.facts.source_limit]
        ids = torch.full_like(mask, self.facts.source_vocabulary - 1)
        with torch.no_grad(), in_float32(self):
            found = super().forward({"input_ids": ids, "attention_mask": mask}, torch.zeros(2, 2, dtype=torch.int64))
            assert found.memory is not None
            check(self.module, self.facts.vocabulary, found.self_kv, found.cross_kv, (found.memory, mask))

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        derived = super().forward(inputs, tokens)
        logits = self._whole.decode(tokens, derived.memory, inputs["attention_mask"])
        return Forward(derived.memory, logits.float(), derived.self_kv, derived.cross_kv)


def open_module(module: Any) -> CustomSource:
    """The source of a module by what its decode() takes: a ``cache`` to write to, or all tokens at once."""
    decode = getattr(module, "decode", None)
    names = list(inspect.signature(decode).parameters) if callable(decode) else []
    return CustomSource(module) if "cache" in names or len(names) != 3 else CachelessSource(module)


def _tried(module: Any, facts: CustomFacts) -> tuple[int, int]:
    """(memory width, vocabulary) from real calls, as long as the module says a target may be.

    Errors:
        SourceError: the module fails, gives something else than memory [B,T,M] and logits [R,Q,V], or has other ids than it says.
    """
    start, pad = (facts.special_ids[f"{name}_token_id"] for name in ("decoder_start", "pad"))
    tokens, mask = torch.full((1, facts.limit or 2), start), torch.ones(1, 2, dtype=torch.int64)
    tokens[0, -1] = pad  # rows that have ended go on with it
    cache = _Recording(tokens, mask)
    with torch.no_grad():
        with _trial("a source of two ids 0"):
            memory = module.encode(torch.zeros_like(mask), mask)
        _check_shape("encode", memory, (1, 2), "M")
        _check_source_ids(module, facts, mask)
        with _trial(f"{tokens.shape[1]} tokens to decode, up to max_length: id {start}, at last {pad}"):
            logits = module.decode(tokens, memory, cache)
    _check_shape("decode", logits, (1, tokens.shape[1]), "V")
    vocabulary = int(logits.shape[-1])
    problems = [
        f"decode() asked for no {kind}-attention of its cache: every layer's goes through cache.{kind}_attention(...)"
        for kind, found in (("self", cache.self_kv), ("cross", cache.cross_kv))
        if not found
    ]
    problems += [
        f"special_ids['eos_token_id'] names {each}: expected ids below {vocabulary}, the width of the logits"
        for each in facts.eos_ids
        if each >= vocabulary
    ]
    if problems:
        raise SourceError(
            explain("this encoder-decoder cannot generate step by step (see docs/custom-models.md):", problems)
        )
    return int(memory.shape[-1]), vocabulary


def _check_source_ids(module: Any, facts: CustomFacts, mask: Tensor) -> None:
    """Raises SourceError where encode() takes the id 0, but not every id that the facts promise it."""
    size, pad = facts.source_vocabulary, facts.special_ids["pad_token_id"]
    promised = {
        f"source_vocabulary = {size}: expected the number of ids that encode() takes": size - 1,
        f"special_ids['pad_token_id'] = {pad}: expected an id that encode() takes, for sources are padded with it": pad,
    }
    problems = []
    for promise, last in promised.items():
        try:
            module.encode(torch.full_like(mask, last), mask)
        except Exception as err:  # whatever a stranger's code raises
            problems.append(f"{promise}; id {last} fails: {type(err).__name__}: {err}")
    if problems:
        raise SourceError(explain("encode() does not take the source's ids (see docs/custom-models.md):", problems))


@contextmanager
def _trial(given: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except Exception as err:  # whatever a stranger's code raises
        raise SourceError(
            f"a trial call failed ({given}): {type(err).__name__}: {err}; "
            "encode(input_ids, attention_mask) and decode(tokens, memory, cache) must take them"
        ) from err


def _check_shape(name: str, value: Any, expected: tuple[int, int], width: str) -> None:
    if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == expected:
        return
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise SourceError(f"{name}() must return a tensor [{expected[0]},{expected[1]},{width}], got {found}")


def _tried_whole(module: Any, facts: Facts) -> None:
    """Raises SourceError where decode() fails for the shortest target or the longest: the reference asks for all between."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for length in (1, facts.limit or 2):
        tokens = torch.full((1, length), int(facts.generation["decoder_start_token_id"]))
        try:
            with torch.no_grad():
                module.decode(tokens, module.encode(ids, torch.ones_like(ids)), torch.ones_like(ids))
        except Exception as err:  # whatever a stranger's code raises
            raise SourceError(
                f"decode(tokens, memory, memory_mask) fails for {length} of at most {facts.limit} tokens: {type(err).__name__}: {err}"
            ) from err
