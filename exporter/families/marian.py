"""Marian and Pegasus: sinusoidal positions in a table."""

from dataclasses import replace

from txopt.exporter.families.family import Family, Positions

MARIAN = Family(
    name="marian",
    model_types=("marian",),
    positions=(Positions(path="model.decoder.embed_positions"),),
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)

PEGASUS = replace(MARIAN, name="pegasus", model_types=("pegasus",))
