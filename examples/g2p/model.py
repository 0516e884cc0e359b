"""The model: a Transformer encoder-decoder that reads letters and writes ARPAbet phonemes.

This file owns the architecture and the loading of its weights, in plain PyTorch. It knows neither words nor phonemes,
only ids, and it knows no cache: ``decode`` takes all tokens at once, in training and in use. txopt derives the rest.
"""

import math
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines, float32 [length,width] (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class Attention(nn.Module):
    """Multi-head attention with four projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """x [B,Q,M] attends to source [B,T,M] where mask, bool [..,Q or 1,T], is True -> [B,Q,M]."""
        q, k, v = self.split(self.query(x)), self.split(self.key(source)), self.split(self.value(source))
        out: Tensor = self.output(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return out

    def split(self, x: Tensor) -> Tensor:
        """[B,Q,M] -> [B,H,Q,D]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,T,M], mask bool [B,1,1,T], True where a token is -> [B,T,M]."""
        y = self.attention_norm(x)
        x = x + self.attention(y, y, mask)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class DecoderLayer(nn.Module):
    """Pre-norm: self-attention, cross-attention, feed-forward, each added to what came in."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width, inner)

    def forward(self, x: Tensor, memory: Tensor, causal: Tensor, mask: Tensor) -> Tensor:
        """x [B,L,M], memory [B,T,M], causal bool [L,L], mask bool [B,1,1,T] -> [B,L,M]."""
        y = self.self_attention_norm(x)
        x = x + self.self_attention(y, y, causal)
        x = x + self.cross_attention(self.cross_attention_norm(x), memory, mask)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class G2P(nn.Module):
    """Letters in, phonemes out; docs/custom-models.md says what txopt asks of it.

    Args:
        source_size: number of source ids (letters and special ids).
        target_size: number of target ids (phonemes and special ids).
        width: M.
        heads: of M / heads = 64 by default, the smallest head size that TensorRT's fused attention takes.
        inner: width inside the feed-forward layers.
        encoder_layers: layers that read.
        decoder_layers: layers that write; every one of them costs time at every phoneme, hence fewer.
        dropout: share of each embedding that training drops.
    """

    special_ids: ClassVar[dict[str, int]] = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokenizers: ClassVar[dict[str, str]] = {"source": "source.json", "target": "target.json"}
    max_length = 64  # rows of the position table, which both sides share

    position_table: Tensor

    def __init__(
        self,
        source_size: int = 31,
        target_size: int = 73,
        *,
        width: int = 192,
        heads: int = 3,
        inner: int = 384,
        encoder_layers: int = 3,
        decoder_layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.source_embedding = nn.Embedding(source_size, width)
        self.target_embedding = nn.Embedding(target_size, width)
        # Not persistent: it follows from its shape, so the weights file need not carry it.
        self.register_buffer("position_table", sinusoids(self.max_length, width), persistent=False)
        # On the embeddings alone: inside the layers it took a fifth of the training time.
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, inner) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, inner) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, target_size, bias=False)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The source, read.

        Args:
            input_ids: int64 [B,T], letters and the end; T at most ``max_length``.
            attention_mask: int64 [B,T], 1 where a token is, 0 where padding is.

        Returns:
            Memory, float [B,T,M].
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.source_embedding(input_ids) * self.scale + self.position_table[positions])
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """What may come after each token.

        Args:
            tokens: int64 [B,L], the first of a row being ``decoder_start_token_id``; L at most ``max_length``.
            memory: float [B,T,M], from ``encode``.
            memory_mask: int64 [B,T], the mask that ``encode`` was given.

        Returns:
            Logits, float [B,L,V].
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        mask = memory_mask.bool()[:, None, None, :]
        x = self.dropout(self.target_embedding(tokens) * self.scale + self.position_table[positions])
        for layer in self.decoder:
            x = layer(x, memory, causal, mask)
        logits: Tensor = self.head(self.decoder_norm(x))
        return logits


def factory() -> G2P:
    """The trained model, in eval mode, with the weights that lie beside this file.

    Raises:
        FileNotFoundError: there are no weights; train.py writes them.
    """
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"expected the trained weights at {WEIGHTS}, found none: run train.py first")
    model = G2P()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
