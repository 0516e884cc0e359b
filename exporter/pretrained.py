"""transformers models as they come: read from a checkpoint's directory, or adopted from memory.

Reads config.json and safetensors; never a pickle, never the network.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationMixin, PreTrainedModel

from txopt.exporter.borrowed import borrowed
from txopt.exporter.families import find
from txopt.exporter.families.family import Family
from txopt.exporter.huggingface import HuggingFaceSource
from txopt.exporter.huggingface_facts import ENCODER_TASKS, known_as
from txopt.exporter.pooling import read_pooling
from txopt.exporter.positions import computed_tables, make_tables
from txopt.runtime.errors import SourceError, explain

# Pretraining heads, under which people keep bodies that are good for embeddings.
LANGUAGE_HEADS = ("ForMaskedLM", "ForPreTraining")

logger = logging.getLogger(__name__)


def load(directory: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> HuggingFaceSource:
    """The checkpoint in ``directory``, its weights in ``dtype``.

    Errors:
        SourceError: no family knows the model, its architecture does not exist, or its weights are not safetensors.
    """
    import transformers

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    family = find(config.model_type)
    if not any(directory.glob("*.safetensors")):
        raise SourceError(
            f"{directory} has no .safetensors file, and txopt opens no pickles; convert the checkpoint once with "
            "model.save_pretrained(...) on a machine that trusts it"
        )
    name = next(iter(config.architectures or []), None)
    architecture = getattr(transformers, name, None) if name else None
    if architecture is None:
        raise SourceError(
            f"config.json of {directory} names the architecture {name!r}, which transformers {transformers.__version__} does not have"
        )
    if family.kind == "encoder" and not getattr(config, "is_decoder", False):
        architecture = _body(architecture, directory)
    _check_architecture(architecture, family, config, f"config.json of {directory} names")
    module = _read(architecture, directory, config, dtype)
    pooling = read_pooling(directory) if family.kind == "encoder" else None
    return HuggingFaceSource(module, family, pooling)


def adopt(module: PreTrainedModel, dtype: torch.dtype) -> HuggingFaceSource:
    """A model in memory, which stays as it is: the copy shares its weights where these are ``dtype``, on the CPU, already.

    Errors:
        SourceError: no family knows it, or its head.
    """
    family = find(module.config.model_type)
    name = type(module).__name__
    if family.kind == "encoder" and known_as(type(module)).endswith(LANGUAGE_HEADS):
        logger.warning("%s is exported without its language-model head, for embeddings", name)
        module = module.base_model
    _check_architecture(type(module), family, module.config, "the model has")
    try:
        copied: Any = borrowed(module).to(device="cpu", dtype=dtype)
    except Exception as err:  # tensors that were computed, locks, files
        advice = "model.save_pretrained(...) it and give the directory"
        raise SourceError(f"{name} cannot be copied ({str(err).strip().splitlines()[0]}); {advice}") from err
    make_tables(copied, dtype)
    return HuggingFaceSource(copied, family)


def _body(architecture: Any, directory: Path) -> Any:
    """The class to load: a masked language model's body without its head, which embeds; any other as it is."""
    import transformers

    head = next((suffix for suffix in LANGUAGE_HEADS if architecture.__name__.endswith(suffix)), None)
    body = getattr(transformers, architecture.__name__.removesuffix(head) + "Model", None) if head else None
    if body is None:
        return architecture
    logger.warning(
        "%s: %s is exported as %s, for embeddings: its language-model head is left out",
        directory.name,
        architecture.__name__,
        body.__name__,
    )
    return body


def _check_architecture(architecture: Any, family: Family, config: Any, subject: str) -> None:
    """Refuses a head or a decoder that the family's road does not carry, before anything is loaded.

    ``subject`` is who says so, with its verb: a file that names the architecture, or the model that has it.
    """
    name = known_as(architecture)
    if family.kind == "encoder":
        speaks = issubclass(architecture, GenerationMixin) or getattr(config, "is_decoder", False)
        body = name.endswith("Model") and not name.endswith("PreTrainedModel")  # which has no forward of its own
        fits = (body or name.endswith(tuple(ENCODER_TASKS))) and not speaks
        expected = "a model without a head (...Model), ...ForSequenceClassification, ...ForTokenClassification or ...ForMaskedLM"
        advice = (
            "to keep the body alone, load the checkpoint in transformers and model.base_model.save_pretrained(...) it"
        )
    else:
        fits = issubclass(architecture, GenerationMixin) and "CausalLM" not in name
        expected = "a model that generates (...ForConditionalGeneration, ...LMHeadModel, ...)"
        advice = "load the checkpoint as such a class in transformers and save_pretrained() it"
    if not fits:
        kind = "a decoder" if getattr(config, "is_decoder", False) or family.kind == "decoder" else f"an {family.kind}"
        found = f"{architecture.__name__!r}" + ("" if architecture.__name__ == name else f" (a {name})")
        raise SourceError(f"{subject} the architecture {found}, as {kind}: expected {expected}; {advice}")
    decoder = getattr(config, "decoder", None)
    if family.decoders and decoder is not None and decoder.model_type not in family.decoders:
        crosses = getattr(decoder, "add_cross_attention", False)
        raise SourceError(
            f"the model's configuration has a decoder of model_type {decoder.model_type!r}"
            f"{'' if crosses else ', and without cross-attention (add_cross_attention: false)'}: a {family.name} is supported "
            f"with {' or '.join(family.decoders)}; other decoders go through the custom door (docs/custom-models.md)"
        )


def _read(architecture: Any, directory: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model, every weight of it from the checkpoint; transformers would make up what is missing."""
    try:
        module, report = architecture.from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as err:  # transformers and safetensors raise a dozen kinds
        reason = str(err).strip().split("\n")[0]
        raise SourceError(f"{directory}: transformers cannot load it as {architecture.__name__}: {reason}") from err
    # An encoder's pooler feeds no output here, and many checkpoints leave it out; sinusoids are computed.
    sinusoids = computed_tables(module)
    wanting = sorted(
        name
        for name in report["missing_keys"]
        if name not in sinusoids and ("pooler." not in name or not architecture.__name__.endswith("Model"))
    )
    if wanting:
        raise SourceError(explain(f"{directory} lacks weights that config.json asks for:", wanting[:12]))
    if (unread := sorted(report["unexpected_keys"])) and not _embeds(architecture, config):
        logger.warning(
            "%s holds weights that %s does not read: %s; is its config.json the one it was trained with?",
            directory.name,
            architecture.__name__,
            ", ".join(unread[:8]) + (f" and {len(unread) - 8} more" if len(unread) > 8 else ""),
        )
    make_tables(module, dtype)
    found: PreTrainedModel = module
    return found


def _embeds(architecture: Any, config: Any) -> bool:
    """Whether only the body of what the checkpoint holds was asked for; its head is left out, and that was said."""
    return architecture.__name__ not in (config.architectures or [architecture.__name__])
