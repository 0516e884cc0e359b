"""Makes tests/data/optimum/*.tar.xz: tiny encoder-decoders as optimum-onnx exports them, with random weights of our own.

Runs in an environment of its own, for optimum-onnx asks for an older transformers than txopt does:

    python -m venv ov
    ov/bin/pip install torch==2.13.0 optimum-onnx==0.1.0 "transformers<4.58" onnxruntime
    ov/bin/python tests/data/make_optimum_folders.py tests/data/optimum

Each archive is what `optimum-cli export onnx` leaves: encoder_model.onnx, decoder_model.onnx, decoder_with_past_model.onnx,
decoder_model_merged.onnx and the configurations. xz keeps the weights, which three of them repeat, once.
"""

import io
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from optimum.exporters.onnx import main_export
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SEED = 20261123
VOCABULARY = 99
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,  # or every logit is nearly the same
}


def t5(folder: Path) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    return T5ForConditionalGeneration(config)


def bart(folder: Path) -> PreTrainedModel:
    ids = {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    model = BartForConditionalGeneration(BartConfig(**SEQ2SEQ, **ids, max_position_embeddings=128))
    model.generation_config.no_repeat_ngram_size = 3
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special).save_pretrained(folder)
    return model


def marian(folder: Path) -> PreTrainedModel:
    ids = {"pad_token_id": 98, "eos_token_id": 0, "decoder_start_token_id": 98, "forced_eos_token_id": 0}
    model = MarianMTModel(MarianConfig(**SEQ2SEQ, **ids, max_position_embeddings=128))
    model.generation_config.bad_words_ids = [[98]]
    return model


def whisper(folder: Path) -> PreTrainedModel:
    ids = {"pad_token_id": 97, "bos_token_id": 97, "eos_token_id": 97, "decoder_start_token_id": 98}
    lengths = {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 128}
    config = WhisperConfig(**SEQ2SEQ, **ids, **lengths, suppress_tokens=[5, 7], begin_suppress_tokens=[9])
    WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=267).save_pretrained(folder)
    return WhisperForConditionalGeneration(config)


MODELS: dict[str, Callable[[Path], PreTrainedModel]] = {"t5": t5, "bart": bart, "marian": marian, "whisper": whisper}


def make(name: str, out: Path) -> None:
    """Writes ``out``/NAME.tar.xz."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, exported = Path(scratch) / "checkpoint", Path(scratch) / "exported"
        torch.manual_seed(SEED)
        MODELS[name](checkpoint).eval().save_pretrained(checkpoint)
        task = "automatic-speech-recognition" if name == "whisper" else "text2text-generation"
        frames = {"nb_max_frames": 60} if name == "whisper" else {}
        main_export(str(checkpoint), output=exported, task=f"{task}-with-past", do_validation=False, **frames)
        with tarfile.open(out / f"{name}.tar.xz", "w:xz", preset=9) as archive:
            for file in sorted(exported.iterdir()):
                entry = tarfile.TarInfo(file.name)  # no times, no names of whoever runs this
                data = file.read_bytes()
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        make(model, target)
