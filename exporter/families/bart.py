"""BART, mBART and MVP: learned positions, stored two rows further down."""

from torch import nn

from txopt.exporter.families.family import Family, Positions
from txopt.exporter.families.written_out import wrap

_POSITIONS = (Positions(path="model.decoder.embed_positions", offset=2),)

BART = Family(
    name="bart",
    model_types=("bart",),
    positions=_POSITIONS,
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)

MBART = Family(
    name="mbart",
    model_types=("mbart",),
    positions=_POSITIONS,
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)


def wrap_attention(module: nn.Module) -> nn.Module:
    """MVP's attention is written out."""
    wrap(module.model.encoder)  # type: ignore[union-attr]
    wrap(module.model.decoder)  # type: ignore[union-attr]
    return module


MVP = Family(
    name="mvp",
    model_types=("mvp",),
    positions=_POSITIONS,
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
    hook=wrap_attention,
)
