"""ProphetNet: a decoder of several streams, of which generation needs the main one and the first that predicts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.prophetnet.modeling_prophetnet import ProphetNetDecoderModelOutput, compute_relative_buckets

from txopt.exporter.attention import attend
from txopt.exporter.cache import current
from txopt.exporter.families.family import Family
from txopt.exporter.families.written_out import WrittenOut
from txopt.exporter.positions import RowPositions
from txopt.runtime.errors import SourceError

_PROJECTIONS = ("query_proj", "key_proj", "value_proj")

# Of each stream: which keys its queries see (boolean [R,1,Q,K]), and the bucket of each (int64, of the same shape).
Streams = Sequence[tuple[Tensor, Tensor]]


class TwoStreams(nn.Module):
    """The self-attention of ``Decoder``, on [R,2Q,M]: main stream, then predicting stream.

    The main stream attends to itself, through the cache. The predicting stream attends to the main one, and each of its places to
    itself: one more key, which is never cached. Both add what their own states say of the distance (relative_pos_embeddings).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Streams | None = None, **_: Any
    ) -> tuple[Tensor, None, None]:
        inner: Any = self.inner
        query, key, value = (self._heads(getattr(inner, name)(hidden_states)) for name in _PROJECTIONS)
        if attention_mask is None:  # the encoder graph's one dummy token, of which only cross-attention is read
            return inner.out_proj(inner.value_proj(hidden_states)), None, None
        biases: Tensor = inner.relative_pos_embeddings(hidden_states)
        by_bucket = biases.view(*biases.shape[:2], inner.num_buckets, -1).permute(0, 3, 1, 2)  # [R,H,2Q,bucket]
        queries = attention_mask[0][0].shape[2]
        (main_query, next_query), (main_key, next_key), (main_value, next_value), (main_bias, next_bias) = (
            (x[:, :, :queries], x[:, :, queries:]) for x in (query, key, value, by_bucket)
        )
        keys, values = past_key_values.self_attention_cache.update(main_key, main_value, inner.layer_idx)
        main = self._attend(main_query, keys, values, main_bias, *attention_mask[0])
        keys, values = torch.cat([keys, next_key], 2), torch.cat([values, next_value], 2)
        following = self._attend(next_query, keys, values, next_bias, *attention_mask[1])
        return inner.out_proj(torch.cat([main, following], 1)), None, None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, by_bucket: Tensor, seen: Tensor, bucket: Tensor
    ) -> Tensor:
        bias = by_bucket.gather(3, bucket.expand(-1, query.shape[1], -1, -1))
        out, _weights = attend(self.inner, query, key, value, seen, position_bias=bias)
        return out.flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        size: Any = self.inner.head_dim
        return x.view(*x.shape[:2], -1, size).transpose(1, 2)


class Decoder(nn.Module):
    """ProphetNet's decoder as generation needs it.

    Logits come from the first predicting stream; no stream sees a later one, so the later ones are left out.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        table = decoder.position_embeddings.weight
        self.word_embeddings = decoder.word_embeddings
        self.positions = RowPositions(table, offset=1)
        self.next_positions = RowPositions(table, offset=2)
        self.stream = nn.Parameter(decoder.ngram_embeddings.weight[-1].detach(), requires_grad=False)  # of the first
        self.embeddings_layer_norm = decoder.embeddings_layer_norm
        self.layers = decoder.layers
        for layer in self.layers:
            layer.self_attn = TwoStreams(layer.self_attn)
            layer.cross_attn = WrittenOut(layer.cross_attn, _PROJECTIONS)
        reach = int(decoder.relative_max_distance)  # every distance from here on has the last bucket
        buckets = compute_relative_buckets(decoder.num_buckets, reach, -torch.arange(reach + 1))
        self.register_buffer("buckets", buckets.long(), persistent=False)

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, past_key_values: Any, **_: Any
    ) -> ProphetNetDecoderModelOutput:
        queries = input_ids.shape[1]
        embedded = self.word_embeddings(input_ids) + self.positions()
        following = (self.next_positions() + self.stream).expand_as(embedded)
        hidden = self.embeddings_layer_norm(torch.cat([embedded, following], 1))
        streams = self._streams()
        for layer in self.layers:
            (hidden,) = layer(hidden, streams, encoder_hidden_states, past_key_values=past_key_values)
        return ProphetNetDecoderModelOutput(
            last_hidden_state=hidden[:, :queries],
            last_hidden_state_ngram=hidden[:, queries:],
            past_key_values=past_key_values,
        )

    def _streams(self) -> Streams | None:
        state = current()
        if state is None:
            return None
        state.ask(2)
        queries = state.positions[:, None, :, None]  # [R,1,Q,1]
        distance = queries - torch.arange(state.causal.shape[3])
        itself = queries == queries.transpose(2, 3)
        seen = torch.cat([state.causal, itself], 3)
        return (
            (state.causal, self._bucket(distance)),
            (seen, torch.cat([self._bucket(distance + 1), torch.zeros_like(itself, dtype=torch.int64)], 3)),
        )

    def _bucket(self, distance: Tensor) -> Tensor:
        buckets: Any = self.buckets
        return buckets[distance.clamp(0, len(buckets) - 1)]


def _with_float_mask(
    encoder: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The encoder subtracts its mask from 1.0, which torch.onnx cannot translate where the mask is integers."""
    return arguments, {**named, "attention_mask": named["attention_mask"].to(encoder.dtype)}


def two_streams(module: nn.Module) -> nn.Module:
    """Routes the encoder's attention, and makes the decoder one of two streams."""
    model: Any = module
    if model.padding_idx != 0:
        raise SourceError(
            f"the model's configuration: pad_token_id: expected 0, got {model.padding_idx}; transformers' ProphetNet counts "
            "positions from it and generates with 0 alone"
        )
    model.prophetnet.encoder.register_forward_pre_hook(_with_float_mask, with_kwargs=True)
    for layer in model.prophetnet.encoder.layers:
        layer.self_attn = WrittenOut(layer.self_attn, _PROJECTIONS)
    model.prophetnet.decoder = Decoder(model.prophetnet.decoder)
    model.config.ngram = 1  # the traced copy's
    return module


PROPHETNET = Family(
    name="prophetnet",
    model_types=("prophetnet",),
    limit="max_position_embeddings-2",  # a position of its own for the first, and one more for what the last predicts
    source_limit="max_position_embeddings-1",
    padding_mask=True,
    stepwise=True,  # given several tokens, transformers mixes up the places and heads of the predicting stream's relative bias
    hook=two_streams,
)
