"""The models that gpu.py measures: small ones of every main family for parity, and three of published sizes for speed.

All have seeded random weights: speed depends on sizes alone, and parity is asked of the same weights in PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from txopt.benchmarks import foreign_models
from txopt.runtime.manifest import Manifest

FAMILIES = ("T5", "BART", "Marian", "M2M100", "Whisper", "TrOCR")
# Heads of 64, the smallest for which TensorRT has kernels of its own.
SMALL = foreign_models.Size(layers=2, width=128, heads=2, vocabulary=320, positions=64)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the length of the sources that it is measured on: tokens, or what its windows of sound are made into."""

    make: Callable[[], Any]
    source: int


def small(name: str) -> Any:
    """The transformers model of this family."""
    return foreign_models.build(name, SMALL).module.model


def _t5_base() -> Any:
    import transformers as t

    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))


def _bart_large() -> Any:
    import transformers as t

    return t.BartForConditionalGeneration(t.BartConfig())  # whose defaults are the large model's


def _whisper_turbo() -> Any:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=51866,
        num_mel_bins=128,
        d_model=1280,
        encoder_layers=32,
        decoder_layers=4,
        encoder_attention_heads=20,
        decoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
    )
    return t.WhisperForConditionalGeneration(config)


SUBJECTS = {
    "T5-base": Subject(make=_t5_base, source=64),
    "BART-large": Subject(make=_bart_large, source=64),
    "Whisper-large-v3-turbo": Subject(make=_whisper_turbo, source=1500),
}
REHEARSED = {"T5 of toy size": Subject(make=lambda: small("T5"), source=16)}


def limits(manifest: Manifest, source: int) -> dict[str, int]:
    """The sizes that engines are built for, by the options of ``txopt engine``; a source of one length has none."""
    varies = any("T" in item.axes for item in manifest.graphs["encoder"].outputs)
    return {"max-batch": 64, "max-beams": 1, "cache-length": 128, **({"max-source": source} if varies else {})}


def build(subject: Subject) -> Any:
    """The transformers model, in float32 on the CPU."""
    import torch

    torch.manual_seed(0)
    return subject.make().eval()
