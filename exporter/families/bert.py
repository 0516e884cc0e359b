"""Encoders alone: BERT, RoBERTa, DistilBERT; the architecture says whether they classify, tag or embed."""

from txopt.exporter.families.family import Family

BERT = Family(
    name="bert", model_types=("bert",), kind="encoder", task="embedding", source_limit="max_position_embeddings"
)

# RoBERTa's positions start after the padding id: its table is two rows longer than its longest source.
ROBERTA = Family(
    name="roberta",
    model_types=("roberta", "xlm-roberta"),
    kind="encoder",
    task="embedding",
    source_limit="max_position_embeddings-pad_token_id-1",
)

DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    kind="encoder",
    task="embedding",
    source_limit="max_position_embeddings",
)
