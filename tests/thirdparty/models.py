"""What a user writes to export a model of a library: encode, decode, and a few facts. Small and seeded; the code inside is theirs."""

import sys
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

VOCABULARY, WIDTH, HEADS, LAYERS = 30, 32, 4, 2


class Wrapper(nn.Module):
    special_ids: ClassVar = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    max_length = 80


class XTransformers(Wrapper):
    """https://github.com/lucidrains/x-transformers: XTransformer with any of its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        from x_transformers import XTransformer

        sizes = {"num_tokens": VOCABULARY, "depth": LAYERS, "heads": HEADS, "attn_dim_head": 8, "max_seq_len": 80}
        sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
        self.model = XTransformer(dim=WIDTH, **sides, **options)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # not mask=: it zeroes padding with einx, which turns sizes into numbers
        seen = attention_mask.bool()[:, None, None, :]
        return self.model.encoder(input_ids, attn_mask=seen, return_embeddings=True)

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        return self.model.decoder.net(tokens, context=memory, context_mask=memory_mask.bool())


class JoeyNMT(Wrapper):
    """https://github.com/joeynmt/joeynmt: its Transformer encoder and decoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        tensorboard, plotting = ModuleType("torch.utils.tensorboard"), ModuleType("joeynmt.plotting")
        tensorboard.SummaryWriter = plotting.plot_heatmap = object  # for its training logs, not for its model
        with patch.dict(sys.modules, {each.__name__: each for each in (tensorboard, plotting)}):
            from joeynmt.decoders import TransformerDecoder
            from joeynmt.encoders import TransformerEncoder
        sizes: dict[str, Any] = {
            "hidden_size": WIDTH,
            "ff_size": 64,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            **options,
        }
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder, self.decoder = TransformerEncoder(**sizes), TransformerDecoder(vocab_size=VOCABULARY, **sizes)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.source(input_ids), None, attention_mask.bool()[:, None])[0]

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        return self.decoder(
            trg_embed=self.target(tokens),
            encoder_output=memory,
            encoder_hidden=None,
            src_mask=memory_mask.bool()[:, None],
            unroll_steps=None,
            hidden=None,
            trg_mask=(tokens != 0)[:, None],
        )[0]


class Eole(Wrapper):
    """https://github.com/eole-nlp/eole, OpenNMT-py's successor: its Transformer encoder and decoder."""

    def __init__(self, positions: str = "SinusoidalInterleaved") -> None:
        super().__init__()
        from eole.config.models import TransformerModelConfig
        from eole.decoders.transformer import TransformerDecoder
        from eole.encoders.transformer import TransformerEncoder
        from eole.modules.embeddings import Embeddings

        embeddings = {"word_vec_size": WIDTH, "position_encoding_type": positions}
        config = TransformerModelConfig(
            layers=LAYERS, heads=HEADS, hidden_size=WIDTH, transformer_ff=64, embeddings=embeddings
        )
        config.decoder.with_cross_attn = True
        self.source, self.target = (
            Embeddings(WIDTH, VOCABULARY, 0, position_encoding_type=config.embeddings.position_encoding_type)
            for _ in range(2)
        )
        self.encoder, self.decoder = TransformerEncoder(config.encoder), TransformerDecoder(config.decoder)
        self.generator = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():  # eole leaves them to what loads a checkpoint
            nn.init.normal_(parameter, 0.0, 0.2)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.source(input_ids), pad_mask=(attention_mask == 0)[:, None])[0]

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        alone = tokens.shape[1] == 1  # which eole takes for a step with a cache of its own
        target = pad(tokens, (0, 1), value=3) if alone else tokens
        padding = (target == 0)[:, None]
        states, _ = self.decoder(
            self.target(target), enc_out=memory, src_pad_mask=(memory_mask == 0)[:, None], tgt_pad_mask=padding
        )
        logits = self.generator(states)
        return logits[:, :1] if alone else logits


def seeded(kind: type[Wrapper], **options: Any) -> Wrapper:
    torch.manual_seed(0)
    return kind(**options).eval()
