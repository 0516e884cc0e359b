"""Every family txopt knows, as one literal; a family costs one file and one line here."""

from txopt.exporter.families import (
    bart,
    bert,
    fsmt,
    gpt2,
    led,
    m2m_100,
    marian,
    prophetnet,
    speecht5,
    t5,
    vision,
    whisper,
)
from txopt.exporter.families.family import Family
from txopt.runtime.errors import SourceError

FAMILIES: tuple[Family, ...] = (
    t5.T5,
    t5.UMT5,
    bart.BART,
    bart.MBART,
    bart.MVP,
    bart.PLBART,
    bart.BLENDERBOT,
    led.LED,
    marian.MARIAN,
    marian.PEGASUS,
    m2m_100.M2M100,
    fsmt.FSMT,
    prophetnet.PROPHETNET,
    whisper.WHISPER,
    speecht5.SPEECHT5,
    vision.VISION_ENCODER_DECODER,
    bert.BERT,
    bert.ROBERTA,
    bert.DISTILBERT,
    gpt2.GPT2,
)


def find(model_type: str) -> Family:
    """The family of a configuration's ``model_type``."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise SourceError(
        f"no family knows model_type {model_type!r}; known: {known}. A module of your own goes through the custom door: "
        "txopt export package.module:factory OUT (docs/custom-models.md)"
    )
