"""Attention within windows as LED's encoder has it, cut into chunks by transformers' own code, and modules that nearly are it."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import LEDConfig
from transformers.models.led.modeling_led import LEDEncoderSelfAttention

from txopt.exporter import onnx_file
from txopt.exporter.fusion import einsum, lengths

HEADS, SIZE = 2, 4
LEAST = torch.finfo(torch.float32).min


class Windows(LEDEncoderSelfAttention):  # type: ignore[misc]  # transformers is untyped
    """x [B,T,8] and which tokens are kept [B,T] to what each hears of ``window`` tokens around it [B,T,8]; steps in methods."""

    def __init__(self, window: int = 8) -> None:
        sizes = {"d_model": HEADS * SIZE, "encoder_attention_heads": HEADS, "encoder_layers": 1}
        super().__init__(LEDConfig(attention_window=[window], **sizes), 0)
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=0.5)

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        query, key, value = (self.by_head(project, x) for project in (self.query, self.key, self.value))
        hidden = (keep == 0)[:, :, None, None]
        scores = self.masked(self.chunked(query * 0.5, key), hidden.float().masked_fill(hidden, LEAST))
        probabilities = self.hide(self.softmax(scores), hidden)
        heard = self._sliding_chunks_matmul_attn_probs_value(probabilities, value, self.one_sided_attn_window_size)
        return self.heard(heard.reshape(x.shape), probabilities)

    def by_head(self, project: nn.Module, x: Tensor) -> Tensor:
        heads: Tensor = project(x).view(*x.shape[:2], HEADS, SIZE)
        return heads

    def chunked(self, query: Tensor, key: Tensor) -> Tensor:
        scores: Tensor = self._sliding_chunks_query_key_matmul(query, key, self.one_sided_attn_window_size)
        return scores

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + self.chunked(mask.new_ones(mask.shape), mask)

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def hide(self, probabilities: Tensor, hidden: Tensor) -> Tensor:
        return probabilities.masked_fill(hidden, 0.0)

    def heard(self, heard: Tensor, probabilities: Tensor) -> Any:
        return heard


class TokensFirst(Windows):
    """As LED lays them out in memory: rows and heads beside one another, which chunks in a file are not cut from."""

    def by_head(self, project: nn.Module, x: Tensor) -> Tensor:
        return super().by_head(project, x.transpose(0, 1)).transpose(0, 1)


class NothingHidden(Windows):
    """Also what it computes for tokens that are not kept."""

    def hide(self, probabilities: Tensor, hidden: Tensor) -> Tensor:
        return probabilities


class OpenEnds(Windows):
    """Scores of tokens before the first and behind the last, which are zero and not hidden."""

    @staticmethod
    def _mask_invalid_locations(input_tensor: Tensor, affected_seq_len: int) -> None:
        pass


class Doubled(Windows):
    """Masks count twice, which no mask that holds the least number shows."""

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + self.chunked(mask.new_full(mask.shape, 2.0), mask)


class Backward(Windows):
    """Scores stand the other way round: the token behind where the token before is."""

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.flip(-1).softmax(-1)


class Scaled(Windows):
    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().masked(scores, mask) * 0.5


class Biased(Windows):
    """Scores meet a number of each query's own."""

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        self.own = x[:, :, None, :1]
        return super().forward(x, keep)

    def softmax(self, scores: Tensor) -> Tensor:
        return (scores + self.own).softmax(-1)


class WithGlobal(Windows):
    """One more column: everybody hears the first token."""

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        self.first = (self.query(x) * self.key(x[:, :1])).view(*x.shape[:2], HEADS, SIZE).sum(-1, keepdim=True)
        return super().forward(x, keep)

    def softmax(self, scores: Tensor) -> Tensor:
        return torch.cat([self.first, scores], -1).softmax(-1)[..., 1:]


class Unmasked(Windows):
    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores


class HalfHidden(Windows):
    def hide(self, probabilities: Tensor, hidden: Tensor) -> Tensor:
        return probabilities.masked_fill(hidden, 0.5)


class AcrossHeads(Windows):
    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(2)


class Shown(Windows):
    def heard(self, heard: Tensor, probabilities: Tensor) -> Any:
        return heard, probabilities


def export(module: nn.Module, path: Path, *, batch: int = 2, tokens: int = 16, fixed: bool = False) -> Path:
    """The file of torch's old exporter, with open lengths unless ``fixed``."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(batch, tokens, HEADS * SIZE, generator=generator), torch.ones(batch, tokens))
    axes = {name: {0: "batch", 1: "tokens"} for name in ("x", "keep")}
    torch.onnx.export(
        module.eval(),
        inputs,
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=list(axes),
        dynamic_axes=None if fixed else axes,
    )
    return path


def prepared(path: Path) -> ir.Model:
    """The file's graph as the fusion finds it."""
    model = onnx_file.load(path)
    onnx_file.convert(model, path)
    onnx_file.clean(model)
    einsum.fuse(model)
    lengths.fuse(model)
    return model
