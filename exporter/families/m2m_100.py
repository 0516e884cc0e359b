"""M2M100 and NLLB: sinusoidal positions that count only tokens which are not padding; the model takes them per row."""

from txopt.exporter.families.family import Family

M2M100 = Family(
    name="m2m_100",
    model_types=("m2m_100",),
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
)
