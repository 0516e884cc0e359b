"""A transformers model as a ``Source``: traces it through its own forward, asks it for reference answers.

The traced copy shares its weights with the original but carries the family's hook and position tables. What a family is lives
in families/; how a model is read, in pretrained.py; how reference cases are chosen, in reference.py.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from txopt.exporter.attention import routed
from txopt.exporter.cache import DecodeState, as_transformers, collecting, decoding
from txopt.exporter.families.family import Family
from txopt.exporter.huggingface_facts import check_limits, facts_of
from txopt.exporter.pooling import Pooling
from txopt.exporter.positions import read_by_row
from txopt.exporter.source import KV, Forward, Generated


class HuggingFaceSource:
    """See ``source.Source``. ``module`` answers as PyTorch; ``traced`` is the copy that is exported."""

    def __init__(self, module: PreTrainedModel, family: Family, pooling: Pooling | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.family = family
        self._pooling = pooling
        self.facts = facts_of(module, family)
        check_limits(self.facts, family)
        self.traced = _prepare(module, family)
        self._layers = _decoder_layers(module)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {item.name: value for item, value in zip(self.facts.inputs, inputs, strict=True)}
        mask = named.get("attention_mask")
        if mask is not None and not self.family.padding_mask:
            named["attention_mask"] = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
        with routed(self.traced):
            if self.facts.kind == "encoder":
                return self._named_outputs(self.traced(**named), mask)
            memory = self.traced.get_encoder()(**named)[0]
            if mask is None or self.facts.framing is None:
                return memory, *self._cross_kv(memory)
            lengths = self.facts.framing.frames(mask.sum(1))
            heard = torch.arange(memory.shape[1]) < lengths[:, None]
            return memory, *self._cross_kv(memory), heard.to(torch.int64)

    def _named_outputs(self, result: Any, mask: Tensor | None) -> tuple[Tensor, ...]:
        if "logits" in self.facts.outputs:
            return (result.logits.float(),)
        memory = result.last_hidden_state
        pooling = self._pooling or Pooling()
        return memory, pooling(memory, mask)

    def _cross_kv(self, memory: Tensor) -> list[Tensor]:
        """K, V of every layer, harvested from one dummy decoder step; all but their projections is dead code to the exporter."""
        cache = collecting(self._layers)
        start = torch.zeros(memory.shape[0], 1, dtype=torch.int64)
        self.traced(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            decoder_input_ids=start,
            decoder_attention_mask=torch.ones(memory.shape[0], 1, 1, 1, dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
        )
        return [x for layer in cache.cross_attention_cache.layers for x in (layer.keys, layer.values)]

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_masks: Sequence[Tensor | None],
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        state = DecodeState(tokens, position, list(self_kv), list(cross_kv), source_masks)
        arguments: dict[str, Any] = {"past_key_values": as_transformers(state), "use_cache": True}
        if self.family.position_argument:
            arguments[self.family.position_argument] = state.positions
        if self.facts.kind == "decoder":
            arguments |= {"input_ids": tokens, "attention_mask": state.causal}
        else:
            # The decoder asks its memory for nothing but a shape: the cross K/V are there already.
            memory = torch.zeros(tokens.shape[0], 1, self._memory_width(), dtype=self.dtype)
            arguments |= {
                "encoder_outputs": BaseModelOutput(last_hidden_state=memory),
                "decoder_input_ids": tokens,
                "decoder_attention_mask": state.causal,
            }
            if state.folded[0] is not None and not self.family.padding_mask:
                arguments["attention_mask"] = state.folded[0]
        with routed(self.traced), decoding(state):
            logits = self.traced(**arguments).logits
        return logits.float(), state.self_kv

    def _memory_width(self) -> int:
        config = self.module.config
        return int(getattr(config, "encoder", config).hidden_size)

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        if self.facts.kind == "decoder":
            extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            out = self.module(input_ids=tokens, use_cache=True, **extra)
            return Forward((), out.logits.float(), _kv(out.past_key_values), [])
        encoded = self.module.get_encoder()(**inputs)
        arguments = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        cache = _growing_cache()
        logits = [
            self.module(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded[0]),
                decoder_input_ids=part,
                past_key_values=cache,
                use_cache=True,
                **arguments,
            ).logits
            for part in (torch.split(tokens, 1, dim=1) if self.family.stepwise else [tokens])
        ]
        return Forward(
            (encoded[0],),
            torch.cat(logits, dim=1).float(),
            _kv(cache.self_attention_cache),
            _kv(cache.cross_attention_cache),
        )

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = self.module(**inputs)
        return dict(zip(self.facts.outputs, self._named_outputs(result, inputs.get("attention_mask")), strict=True))

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        # The mixin's own, which all families share: Whisper's override adds long form and cuts the prompt away.
        asked = {**options, "return_dict_in_generate": True, "output_scores": True}
        if self.facts.kind == "encoder-decoder":
            asked["past_key_values"] = _growing_cache()
        result: Any = GenerationMixin.generate(self.module, **inputs, **asked)
        return Generated(result.sequences, getattr(result, "sequences_scores", None))


def _growing_cache() -> EncoderDecoderCache:
    """A cache that grows with the layers that write to it; transformers' own has as many as the *encoder*, which fails with more."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _prepare(module: PreTrainedModel, family: Family) -> Any:
    """The copy that is traced: same weights, the family's hook and position table in place."""
    tensors = [*module.parameters(), *module.buffers()]
    traced = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    read_by_row(traced, family.positions)
    return traced if family.hook is None else family.hook(traced)


def _decoder_layers(module: PreTrainedModel) -> int:
    config = module.config
    decoder = getattr(config, "decoder", config)
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return int(next(value for name in names if (value := getattr(decoder, name, None)) is not None))


def _kv(cache: Any) -> list[KV]:
    return [(layer.keys, layer.values) for layer in cache.layers]
