"""Anyone's own encoder-decoder (custom.py) as a ``Source``."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from txopt.exporter.cache import CrossCollector, DecodeState
from txopt.exporter.custom import CrossKV, FullSequence
from txopt.exporter.families.family import TEXT
from txopt.exporter.incremental import Incremental
from txopt.exporter.incremental_check import check
from txopt.exporter.precision import in_float32
from txopt.exporter.source import KV, Facts, Forward, Generated
from txopt.runtime.errors import SourceError, explain

_SPECIAL_IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


class _Recording(FullSequence):
    """FullSequence that keeps what it saw, as reference for the caches."""

    def __init__(self, tokens: Tensor, attention_mask: Tensor) -> None:
        super().__init__(tokens, attention_mask)
        self.self_kv: list[KV] = []
        self.cross_kv: list[KV] = []

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.self_kv.append((k, v))
        return super().self_attention(layer, q, k, v, bias=bias, scale=scale)

    def cross_attention(self, layer: int, q: Tensor, kv: CrossKV, *, scale: float | None = None) -> Tensor:
        pair = kv()
        self.cross_kv.append(pair)
        return super().cross_attention(layer, q, lambda: pair, scale=scale)


class CustomSource:
    """See ``source.Source``; the module follows ``custom.CustomEncoderDecoder``."""

    def __init__(self, module: Any) -> None:
        _check(module)
        self.module: Any = module.eval().requires_grad_(False)
        self.traced: Any = module
        limit = getattr(module, "max_length", None)
        self._width, vocabulary = _tried(module, limit)
        self.facts = Facts(
            kind="encoder-decoder",
            task="text-to-text",
            family="custom",
            inputs=TEXT,
            generation={**module.special_ids, **({} if limit is None else {"max_length": limit})},
            vocabulary=vocabulary,
            source_vocabulary=_source_vocabulary(module),
            limit=limit,
            source_limit=getattr(module, "max_source_length", limit),
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
                logits[:, generation["eos_token_id"]] = -torch.inf
            chosen = logits.argmax(-1)
            chosen[finished] = generation["pad_token_id"]
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            finished |= chosen == generation["eos_token_id"]
            if finished.all():
                break
        return Generated(ids)


class CachelessSource(CustomSource):
    """A module whose decode(tokens, memory, memory_mask) takes all tokens at once: its cache is derived (incremental.py).

    PyTorch's answers are the full sequence's own; the derived decoder has no say in them.
    """

    def __init__(self, module: Any) -> None:
        _check(module)
        super().__init__(Incremental(module.eval().requires_grad_(False)))
        self._whole = module
        _tried_whole(module)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        ids = torch.full_like(mask, int(module.special_ids["eos_token_id"]))
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


def _tried(module: Any, limit: int | None) -> tuple[int, int]:
    """(memory width, vocabulary) from one real call, as long as the module says a target may be.

    Errors:
        SourceError: the module fails, or gives something else than memory [B,T,M] and logits [R,Q,V].
    """
    special = module.special_ids
    tokens = torch.full((1, limit or 2), int(special["decoder_start_token_id"]))
    ids = torch.full((1, 2), int(special["eos_token_id"]))
    try:
        with torch.no_grad():
            memory = module.encode(ids, torch.ones_like(ids))
            logits = module.decode(tokens, memory, FullSequence(tokens, torch.ones_like(ids)))
    except SourceError:
        raise
    except Exception as err:  # whatever a stranger's code raises
        raise SourceError(
            f"a trial call failed (source of 2 eos ids, {tokens.shape[1]} start ids to decode): {type(err).__name__}: {err}; "
            "encode(input_ids, attention_mask) and decode(tokens, memory, cache) must take them, up to max_length tokens"
        ) from err
    for name, value, axes in (("encode", memory, "[1,2,M]"), ("decode", logits, f"[1,{tokens.shape[1]},V]")):
        if (
            not isinstance(value, Tensor)
            or value.dim() != 3
            or value.shape[:2] != (1, 2 if name == "encode" else tokens.shape[1])
        ):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SourceError(f"{name}() must return a tensor {axes}, got {found}")
    return int(memory.shape[-1]), int(logits.shape[-1])


def _tried_whole(module: Any) -> None:
    """A cacheless decode() for the shortest target and the longest: the reference asks for all that lie between.

    Errors:
        SourceError: it fails.
    """
    special = module.special_ids
    ids = torch.full((1, 2), int(special["eos_token_id"]))
    for length in (1, module.max_length):
        tokens = torch.full((1, length), int(special["decoder_start_token_id"]))
        try:
            with torch.no_grad():
                module.decode(tokens, module.encode(ids, torch.ones_like(ids)), torch.ones_like(ids))
        except Exception as err:  # whatever a stranger's code raises
            raise SourceError(
                f"decode(tokens, memory, memory_mask) fails for {length} of at most {module.max_length} tokens: "
                f"{type(err).__name__}: {err}"
            ) from err


def _check(module: Any) -> None:
    problems = []
    if not isinstance(module, nn.Module):
        problems.append(f"expected an nn.Module, got {type(module).__name__}")
    problems += [f"no method {name}()" for name in ("encode", "decode") if not callable(getattr(module, name, None))]
    special = getattr(module, "special_ids", None)
    if not isinstance(special, Mapping):
        problems.append("no special_ids: a mapping with " + ", ".join(_SPECIAL_IDS))
    else:
        problems += [f"special_ids has no {name}" for name in _SPECIAL_IDS if name not in special]
    limit = getattr(module, "max_length", None)
    if limit is not None and (not isinstance(limit, int) or limit < 2):
        problems.append(f"max_length must be a number of at least 2, or absent, got {limit!r}")
    if problems:
        raise SourceError(explain("this is no custom encoder-decoder (see docs/custom-models.md):", problems))


def _source_vocabulary(module: nn.Module) -> int:
    size = getattr(module, "source_vocabulary", None)
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    if size is None and not tables:
        raise SourceError(
            "the number of source ids is unknown: the module has no nn.Embedding; give it source_vocabulary = N"
        )
    return int(size if size is not None else min(tables))
