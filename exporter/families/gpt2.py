"""GPT-2: a decoder alone."""

from txopt.exporter.families.family import Family

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    kind="decoder",
    task="text-generation",
    inputs=(),
    limit="max_position_embeddings",
    position_argument="position_ids",
)
