"""BART and mBART: learned positions, stored two rows further down."""

from txopt.exporter.families.family import Family, Positions

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
