"""M2M100 and NLLB: sinusoidal positions in a buffer, counted from after the padding id."""

from txopt.exporter.families.family import Family, Positions

M2M100 = Family(
    name="m2m_100",
    model_types=("m2m_100",),
    positions=(Positions(path="model.decoder.embed_positions", weight="weights", after_padding=True),),
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)
