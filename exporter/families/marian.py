"""Marian and Pegasus: sinusoidal positions in a table."""

from txopt.exporter.families.family import Family, Positions

_POSITIONS = (Positions(path="model.decoder.embed_positions"),)

MARIAN = Family(
    name="marian",
    model_types=("marian",),
    positions=_POSITIONS,
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)

PEGASUS = Family(
    name="pegasus",
    model_types=("pegasus",),
    positions=_POSITIONS,
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)
