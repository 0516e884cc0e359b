"""Images to text: a vision encoder and a TrOCR decoder, whose attention is written out."""

from torch import nn

from txopt.exporter.families.family import Family, Positions
from txopt.exporter.families.written_out import wrap
from txopt.exporter.source import Input


def wrap_attention(module: nn.Module) -> nn.Module:
    """Puts ``WrittenOut`` around every attention of a TrOCR decoder."""
    wrap(module.decoder.model.decoder)  # type: ignore[union-attr]
    return module


VISION_ENCODER_DECODER = Family(
    name="vision-encoder-decoder",
    model_types=("vision-encoder-decoder",),
    task="image-to-text",
    inputs=(
        Input(
            name="pixel_values",
            dtype="float",
            axes=("B", "encoder.num_channels", "encoder.image_size.0", "encoder.image_size.1"),
        ),
    ),
    decoders=("trocr",),
    positions=(
        Positions(path="decoder.model.decoder.embed_positions", offset=2),
        Positions(path="decoder.model.decoder.embed_positions", weight="weights", after_padding=True),  # sinusoidal
    ),
    limit="decoder.max_position_embeddings",
    hook=wrap_attention,
)
