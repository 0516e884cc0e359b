"""nn.Transformer as its documentation has it, with no cache anywhere: ``txopt export txopt.examples.cacheless:factory OUT``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """nn.Transformer as its documentation has it; no cache anywhere."""

    special_ids: ClassVar = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    max_length = 256

    def __init__(self, width: int = 512, heads: int = 8, layers: int = 6, vocabulary: int = 8000) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(256, width)
        options: dict[str, Any] = {"dim_feedforward": 4 * width, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoderLayer(width, heads, **options)
        self.encoder = nn.TransformerEncoder(encoder, layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, **options), layers)
        self.head = nn.Linear(width, vocabulary)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        memory: Tensor = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return memory

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=memory_mask == 0)
        logits: Tensor = self.head(x)
        return logits


def factory() -> Plain:
    """The model with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return Plain().eval()
