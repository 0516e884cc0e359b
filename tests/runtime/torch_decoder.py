"""Tiny seeded transformers models, and any of them as a ``Decoder`` that recomputes everything at every step."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from txopt.runtime.decoder import Floats, Ids

VOCABULARY = 48


@dataclass
class TorchDecoder:
    """R rows of ``model``; ``inputs`` are one source's each, repeated already. Counts its calls."""

    model: Any
    inputs: dict[str, torch.Tensor]
    max_length: int | None = None
    calls: list[str] = field(default_factory=list)

    def prefill(self, ids: Ids, mask: Ids | None) -> Floats:
        self.ids = torch.tensor(ids)
        self.mask = torch.ones_like(self.ids) if mask is None else torch.tensor(mask)
        return self._logits("prefill")

    def step(self, ids: Ids) -> Floats:
        assert ids.dtype == np.int64
        assert ids.shape == (len(self.ids),)
        self.ids = torch.cat([self.ids, torch.tensor(ids)[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._logits("step")

    def reorder(self, rows: Ids) -> None:
        self.calls.append("reorder")
        self.ids, self.mask = self.ids[torch.tensor(rows)], self.mask[torch.tensor(rows)]

    def _logits(self, call: str) -> Floats:
        self.calls.append(call)
        with torch.no_grad():
            if self.model.config.is_encoder_decoder:
                output = self.model(decoder_input_ids=self.ids, **self.inputs)
            else:
                positions = (self.mask.cumsum(1) - 1).clamp(min=0)
                output = self.model(input_ids=self.ids, attention_mask=self.mask, position_ids=positions)
        if not hasattr(self, "_buffer"):
            self._buffer = np.empty((len(self.ids), output.logits.shape[-1]), np.float32)
        self._buffer[:] = output.logits[:, -1].numpy()
        return self._buffer  # the same one every time: a loop that keeps it sees it change


def _talkative(model: Any, end: int, loudness: float = 1.5, gain: float = 1.7) -> Any:
    """Random weights as they come say one token for ever: here every layer matters, and texts end."""
    # T5's is tied to its input, which it would say again.
    model.lm_head.weight = torch.nn.Parameter(torch.empty(model.lm_head.weight.shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "shared" in name or ".wte" in name or ".wpe" in name or "relative" in name:
                parameter.normal_(std=3)
            elif "lm_head" in name:
                parameter.normal_(std=loudness / parameter.shape[1] ** 0.5)
                parameter[end] *= 1.3
            elif "encoder_attn.out" in name or "EncDecAttention.o" in name:
                # The source matters, the words said so far matter more.
                parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=gain / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny(name: str) -> Any:
    """A model by the name of its architecture: "t5", "bart" or "gpt2", the same one every time."""
    torch.manual_seed({"t5": 9, "bart": 6, "gpt2": 9}[name])
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = T5Config(**common, **sizes, decoder_start_token_id=0)
        return _talkative(T5ForConditionalGeneration(config), end=1, loudness=9)
    if name == "bart":
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
        return _talkative(BartForConditionalGeneration(BartConfig(**common, **sizes, **heads)), end=2, gain=0.8)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return _talkative(GPT2LMHeadModel(GPT2Config(**common, **sizes, **special)), end=2)
