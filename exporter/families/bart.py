"""BART and its relatives: learned positions, stored two rows further down, but for Blenderbot's."""

from dataclasses import replace

from torch import nn

from txopt.exporter.families.family import Family, Positions
from txopt.exporter.families.written_out import wrap

BART = Family(
    name="bart",
    model_types=("bart",),
    positions=(Positions(path="model.decoder.embed_positions", offset=2),),
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)

MBART = replace(BART, name="mbart", model_types=("mbart",))

PLBART = replace(BART, name="plbart", model_types=("plbart",))

BLENDERBOT = replace(
    BART,
    name="blenderbot",
    model_types=("blenderbot", "blenderbot-small"),
    positions=(Positions(path="model.decoder.embed_positions"),),
)


def wrap_attention(module: nn.Module) -> nn.Module:
    """MVP's attention is written out."""
    wrap(module.model.encoder)  # type: ignore[union-attr]
    wrap(module.model.decoder)  # type: ignore[union-attr]
    return module


MVP = replace(BART, name="mvp", model_types=("mvp",), hook=wrap_attention)
