"""Anyone's own encoder-decoder (custom.py) as a ``Source``."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from txopt.exporter import custom_facts, custom_inputs
from txopt.exporter.cache import CrossCollector, DecodeState
from txopt.exporter.calls import calling, shapes, told
from txopt.exporter.custom import CrossKV, FullSequence, as_memories, check_layer, check_logits, in_a_tuple
from txopt.exporter.custom_facts import CustomFacts
from txopt.exporter.custom_steady import steady
from txopt.exporter.incremental import Incremental
from txopt.exporter.incremental_check import check
from txopt.exporter.precision import in_float32
from txopt.exporter.recurrent import none_in_decode
from txopt.exporter.source import KV, Facts, Forward, Generated
from txopt.runtime.errors import SourceError, explain
from txopt.runtime.graphs import SOURCE_AXES

_TAKES = "encode() and decode() must take them; of its cache decode() may ask positions, self_attention() and cross_attention()"


class _Recording(FullSequence):
    """FullSequence that keeps what it saw, as reference for the caches."""

    def __init__(self, tokens: Tensor, attention_mask: Tensor | Sequence[Tensor | None]) -> None:
        super().__init__(tokens, attention_mask)
        self.self_kv: list[KV] = []
        self.cross_kv: list[KV] = []
        self.crossed: list[int] = []  # the memory of each cross-attention

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        check_layer("self", layer, len(self.self_kv))
        self.self_kv.append((k, v))
        return super().self_attention(layer, q, k, v, bias=bias, scale=scale)

    def cross_attention(
        self, layer: int, q: Tensor, kv: CrossKV, *, memory: int = 0, scale: float | None = None
    ) -> Tensor:
        check_layer("cross", layer, len(self.cross_kv))
        if memory not in range(len(self._sources)):
            raise SourceError(
                f"decode() asks for cross-attention {layer} to memory {memory!r}: encode() returns {len(self._sources)}, from 0 on"
            )
        pair = kv()
        self.cross_kv.append(pair)
        self.crossed.append(memory)
        return super().cross_attention(layer, q, lambda: pair, memory=memory, scale=scale)


class CustomSource:
    """See ``source.Source``; the module follows ``custom.CustomEncoderDecoder``."""

    def __init__(self, module: Any) -> None:
        found = custom_facts.read(module)
        self.module: Any = module.eval().requires_grad_(False)
        self.traced: Any = module
        self._eos = torch.tensor(found.eos_ids)
        trial = _tried(module, found)
        self._widths, self._several = trial.widths, trial.several
        self.facts = Facts(
            kind="encoder-decoder",
            task="text-to-text",
            family="custom",
            inputs=found.inputs,
            generation={**found.special_ids, **({} if found.limit is None else {"max_length": found.limit})},
            vocabulary=trial.vocabulary,
            source_vocabulary=found.source_vocabulary,
            limit=found.limit,
            source_limit=found.source_limit,
            memories=custom_inputs.memories_of(found.inputs, found.masks),
            crossed=trial.crossed,
        )

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        returned = self.traced.encode(*inputs)
        memories = as_memories(returned)
        start = torch.zeros(memories[0].shape[0], 1, dtype=torch.int64)
        collector = CrossCollector(start)
        self.traced.decode(start, returned, collector)
        return *memories, *(x for pair in collector.cross_kv for x in pair)

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_masks: Sequence[Tensor | None],
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        state = DecodeState(tokens, position, list(self_kv), list(cross_kv), source_masks)
        memories = [
            torch.zeros(1, 1, width, dtype=cross_kv[0][0].dtype) for width in self._widths
        ]  # K/V are there already
        return self.traced.decode(tokens, self._as_returned(memories), state).float(), state.self_kv

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        cache = _Recording(tokens, self._masks(inputs))
        with _any_shape(inputs, tokens):
            returned = self.module.encode(*(inputs[item.name] for item in self.facts.inputs))
            logits = self.module.decode(tokens, returned, cache)
        return Forward(as_memories(returned), logits.float(), cache.self_kv, cache.cross_kv)

    def _masks(self, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
        """By memory."""
        return [None if memory.mask is None else inputs[memory.mask] for memory in self.facts.memories]

    def _as_returned(self, each: Sequence[Any]) -> Any:
        """One thing for each memory, as the module knows its memories: a tuple where encode() returns one, else the thing itself."""
        return tuple(each) if self._several else each[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise SourceError("a custom module is an encoder-decoder; encoders alone come from checkpoints")

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        """Greedy ids by the plainest loop there is; None for beams, which a custom module has no reference for."""
        if options.get("num_beams", 1) != 1:
            return None
        generation = self.facts.generation
        batch = len(next(iter(inputs.values())))
        ids = torch.full((batch, 1), generation["decoder_start_token_id"])
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
        known = custom_facts.read(
            module
        )  # before its decode() is made a graph, whose errors would hide what is wrong here
        super().__init__(Incremental(module.eval().requires_grad_(False), known))
        self._whole = module
        lengths = custom_inputs.example_lengths(known.inputs, 4)
        inputs = custom_inputs.examples(known.inputs, lengths, rows=2, ids=1 << 62)
        for name in self.facts.masks:
            inputs[name][1, 2:] = 0
        with torch.no_grad(), in_float32(self):
            self._try_lengths(inputs)
            found = super().forward(inputs, torch.zeros(2, 2, dtype=torch.int64))
            check(self.module, self.facts.vocabulary, found, self._masks(inputs))

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        derived = super().forward(inputs, tokens)
        memories, masks = self._as_returned(derived.memories), self._as_returned(self._masks(inputs))
        with _any_shape(inputs, tokens):
            logits = self._whole.decode(tokens, memories, masks)
        return Forward(derived.memories, logits.float(), derived.self_kv, derived.cross_kv)

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        found = super().generate(inputs, **options)
        if found is not None and self.module.asks_for_padding is not None:
            self._check_padding(inputs, found.ids)
        return found

    def _check_padding(self, inputs: Mapping[str, Tensor], ids: Tensor) -> None:
        """Raises SourceError where ``ids`` hold the padding id before their end, and what is said behind it is another for that."""
        pad, known = self.facts.generation["pad_token_id"], ids[:, :-1]
        unfinished = torch.isin(known[:, 1:], self._eos).cumsum(1) == 0
        padding = unfinished & (known[:, 1:] == pad)
        if not bool(padding.any()):
            return
        whole, derived = self.forward(inputs, known).logits, super().forward(inputs, known).logits
        moved = (unfinished & (whole.argmax(-1) != derived.argmax(-1))[:, 1:] & padding.any(1, keepdim=True)).any(1)
        if bool(moved.any()):
            row = int(moved.nonzero()[0])
            raise SourceError(
                f"{self.module.asks_for_padding} asks which tokens of the target are padding (id {pad}), and decode() says that id "
                f"itself (greedy, row {row}, token {int(padding[row].nonzero()[0]) + 1}): what it says behind that follows from what "
                f"the row's earlier tokens are, and a cache takes none of them for padding; train it not to say {pad}, or lower that "
                "id's logit"
            )

    def _try_lengths(self, inputs: Mapping[str, Tensor]) -> None:
        """Raises SourceError where decode() fails for the shortest target or the longest: the reference asks for all between."""
        returned, masks = self._whole.encode(*inputs.values()), self._as_returned(self._masks(inputs))
        for length in (1, self.facts.limit or 2):
            tokens = torch.full((2, length), int(self.facts.generation["decoder_start_token_id"]))
            what = f"decode(tokens, memory, memory_mask) fails for {length} of at most {self.facts.limit} tokens"
            with calling(what, "it must take any number of them, up to max_length"):
                self._whole.decode(tokens, returned, masks)


def open_module(module: Any) -> CustomSource:
    """The source of a module by what its decode() takes: a ``cache`` to write to, or all tokens at once."""
    decode = getattr(module, "decode", None)
    names = list(inspect.signature(decode).parameters) if callable(decode) else []
    return CustomSource(module) if "cache" in names or len(names) != 3 else CachelessSource(module)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What real calls told: widths of the memories, whether encode() returns them as a tuple, the memory of each cross-attention."""

    widths: tuple[int, ...]
    several: bool
    crossed: tuple[int, ...]
    vocabulary: int


_UNASKED = {
    kind: f"decode() asked for no {kind}-attention of its cache: every layer's goes through cache.{kind}_attention(...)"
    for kind in ("self", "cross")
}
_UNATTENDED = {  # of a module whose cache is derived
    "self": "decode() attends to none of its own tokens by softmax(Q K^T) V, so a step would know nothing of those before it; "
    "sums that run along them, as linear attention has, cannot be cached so",
    "cross": "decode() attends to no memory by softmax(Q K^T) V, so what it generates would not depend on the source",
}


def _tried(module: Any, facts: CustomFacts) -> _Trial:
    """Calls as long as the module says a target may be.

    Errors:
        SourceError: the module fails, gives something else than memories [B,T,M] and logits [R,Q,V], or has other ids than it says.
    """
    start, pad = (facts.special_ids[f"{name}_token_id"] for name in ("decoder_start", "pad"))
    tokens = torch.full((1, facts.limit or 2), start)
    tokens[0, -1] = pad  # rows that have ended go on with it
    dtype = next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)
    lengths = custom_inputs.example_lengths(facts.inputs, 2)
    inputs = custom_inputs.examples(facts.inputs, lengths, dtype=dtype)
    masks = [None if mask is None else inputs[mask] for mask in facts.masks]
    caches: list[_Recording] = []

    def decoded() -> Any:
        caches.append(_Recording(tokens, masks))
        return module.decode(tokens, returned, caches[-1])

    with torch.no_grad():
        with _trial("a source of ids 0"):
            returned = steady("encode()", lambda: module.encode(*inputs.values()))
        memories = custom_inputs.check_memories(returned, facts.masks, inputs)
        _check_fixed(module, facts, memories, dtype)
        _check_source_ids(module, facts, inputs)
        given = f"{tokens.shape[1]} tokens to decode, up to max_length: id {start}, at last {pad}{in_a_tuple(returned)}"
        with _trial(given), none_in_decode(module):
            logits = steady("decode()", decoded)
    cache = caches[0]
    check_logits(logits, 1, tokens.shape[1])
    vocabulary = int(logits.shape[-1])
    problems = [
        (_UNATTENDED if isinstance(module, Incremental) else _UNASKED)[kind]
        for kind, found in (("self", cache.self_kv), ("cross", cache.cross_kv))
        if not found
    ]
    if cache.cross_kv:
        problems += [
            f"no cross-attention reads memory {index}: leave out of encode()'s result what the decoder does not attend to"
            for index in sorted(set(range(len(memories))) - set(cache.crossed))
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
    return _Trial(
        widths=tuple(int(memory.shape[-1]) for memory in memories),
        several=isinstance(returned, (tuple, list)),
        crossed=tuple(cache.crossed),
        vocabulary=vocabulary,
    )


def _check_fixed(module: Any, facts: CustomFacts, memories: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises SourceError where a memory without a mask is longer or shorter for another source."""
    if None not in facts.masks:
        return
    shorter = custom_inputs.examples(facts.inputs, dict.fromkeys(SOURCE_AXES, 1), dtype=dtype)
    with _trial("a source of one id 0"):
        others = as_memories(module.encode(*shorter.values()))
    for index, (mask, memory, other) in enumerate(zip(facts.masks, memories, others, strict=True)):
        if mask is None and memory.shape[1] != other.shape[1]:
            raise SourceError(
                f"memory_masks[{index}] is None, so memory {index} must be of one length for all sources, got lengths "
                f"{memory.shape[1]} and {other.shape[1]}: name the input that masks it"
            )


def _check_source_ids(module: Any, facts: CustomFacts, inputs: Mapping[str, Tensor]) -> None:
    """Raises SourceError where encode() takes the id 0, but not every id that the facts promise it."""
    pad, declared = facts.special_ids["pad_token_id"], hasattr(module, "inputs")
    problems = []
    for item in facts.inputs:
        if (size := item.vocabulary) is None:
            continue
        said = f"inputs[{item.name!r}]['vocabulary']" if declared else "source_vocabulary"
        promised = {
            f"{said} = {size}: expected the number of ids that encode() takes": size - 1,
            f"special_ids['pad_token_id'] = {pad}: expected an id that encode() takes, for sources are padded with it": pad,
        }
        for promise, last in promised.items():
            try:
                module.encode(*({**inputs, item.name: torch.full_like(inputs[item.name], last)}.values()))
            except Exception as err:  # whatever a stranger's code raises
                problems.append(f"{promise}; id {last} fails: {told(err)}")
    if problems:
        raise SourceError(explain("encode() does not take the source's ids (see docs/custom-models.md):", problems))


def _any_shape(inputs: Mapping[str, Tensor], tokens: Tensor) -> AbstractContextManager[None]:
    return calling(
        f"encode() and decode() fail for {shapes({**inputs, 'tokens': tokens})}",
        "they must take any number of rows, and any length up to max_source_length and max_length",
    )


def _trial(given: str) -> AbstractContextManager[None]:
    return calling(f"a trial call failed ({given})", _TAKES)
