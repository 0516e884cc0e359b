"""Tiny seeded models of every family, saved as checkpoints: the same code as the real ones, a few thousand weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

_SIZES: dict[str, Any] = {"vocab_size": 100, "d_model": 64}
_SIZES_OF_FSMT: dict[str, Any] = {"src_vocab_size": 110, "tgt_vocab_size": 100, "d_model": 64}
_PROPHETNET: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_LAYERS: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_POSITIONS: dict[str, Any] = {"max_position_embeddings": 80}
_IDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}
_START_AT_PAD: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_T5: dict[str, Any] = {**_SIZES, **_START_AT_PAD, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_BERT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    **_POSITIONS,
}


def _trocr() -> Any:
    vit = t.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    trocr = t.TrOCRConfig(
        **_SIZES,
        **_POSITIONS,
        **_IDS,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        cross_attention_hidden_size=32,
    )
    model = t.VisionEncoderDecoderModel(encoder=t.ViTModel(vit), decoder=t.TrOCRForCausalLM(trocr))
    for name, value in _IDS.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model


def _whisper() -> Any:
    config = t.WhisperConfig(**_SIZES, **_LAYERS, **_IDS, max_source_positions=50, max_target_positions=80)
    return t.WhisperForConditionalGeneration(config)


def _speecht5() -> Any:
    """One second of sound is 16 frames here: kernels and strides that agree with nothing else."""
    config = t.SpeechT5Config(
        vocab_size=100,
        hidden_size=64,
        **_LAYERS,
        **_IDS,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 3),
        conv_stride=(5, 4, 2),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4,
        encoder_max_relative_position=3,
        max_speech_positions=60,
        max_text_positions=80,
    )
    return t.SpeechT5ForSpeechToText(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5)),
    "t5-gated": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    # Sizes that agree with nothing else: more decoder than encoder layers, heads that do not divide the width.
    "t5-uneven": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**{**_T5, "d_model": 48, "d_kv": 24, "num_heads": 5, "num_layers": 1, "num_decoder_layers": 3})
    ),
    "mt5": lambda: t.MT5ForConditionalGeneration(t.MT5Config(**_T5)),
    "umt5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**_T5)),
    "plbart": lambda: t.PLBartForConditionalGeneration(t.PLBartConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)),
    "blenderbot": lambda: t.BlenderbotForConditionalGeneration(
        t.BlenderbotConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)
    ),
    "blenderbot-small": lambda: t.BlenderbotSmallForConditionalGeneration(
        t.BlenderbotSmallConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)
    ),
    "mvp": lambda: t.MvpForConditionalGeneration(t.MvpConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)),
    "mbart": lambda: t.MBartForConditionalGeneration(t.MBartConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)),
    "marian": lambda: t.MarianMTModel(
        t.MarianConfig(**_SIZES, **_LAYERS, **_POSITIONS, pad_token_id=99, eos_token_id=0, decoder_start_token_id=99)
    ),
    "pegasus": lambda: t.PegasusForConditionalGeneration(
        t.PegasusConfig(**_SIZES, **_LAYERS, **_POSITIONS, **_START_AT_PAD)
    ),
    "m2m_100": lambda: t.M2M100ForConditionalGeneration(t.M2M100Config(**_SIZES, **_LAYERS, **_POSITIONS, **_IDS)),
    # Two vocabularies, and a source's ids that the target's does not have.
    # Windows of two sizes, shorter than the sources of the reference cases.
    "led": lambda: t.LEDForConditionalGeneration(
        t.LEDConfig(
            **_SIZES,
            **_LAYERS,
            **_IDS,
            attention_window=[8, 4],
            max_encoder_position_embeddings=80,
            max_decoder_position_embeddings=80,
        )
    ),
    "fsmt": lambda: t.FSMTForConditionalGeneration(
        t.FSMTConfig(**_SIZES_OF_FSMT, **_LAYERS, **_POSITIONS, num_beams=1, max_length=20)
    ),
    # Three streams that predict, of which one is exported; distances that share buckets.
    "prophetnet": lambda: t.ProphetNetForConditionalGeneration(
        t.ProphetNetConfig(**_PROPHETNET, **_POSITIONS, ngram=3, num_buckets=8, relative_max_distance=16)
    ),
    "whisper": _whisper,
    "trocr": _trocr,
    "speecht5": _speecht5,
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=80, bos_token_id=0, eos_token_id=2)
    ),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**_BERT, num_labels=3)),
    "roberta": lambda: t.RobertaForTokenClassification(t.RobertaConfig(**_BERT, num_labels=3)),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128, **_POSITIONS)
    ),
}


def checkpoint(name: str, directory: Path) -> Path:
    """Saves the tiny model ``name`` under ``directory``; weights are spread so that greedy ids vary from step to step."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(
                    torch.randn_like(parameter) * 0.1
                )  # norms and biases that would hide if they were 1 and 0
    model.save_pretrained(directory / name)
    return directory / name


def hearing_a_second(whisper: Path, folder: Path) -> Path:
    """A copy of Whisper's checkpoint in ``folder`` that listens for a second, as long as its few positions last."""
    shutil.copytree(whisper, folder)
    t.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    return folder
