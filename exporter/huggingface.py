"""A Hugging Face checkpoint as a ``Source``: loads it, traces it through its own forward, asks it for reference answers.

The traced copy shares its weights with the original but carries the family's hook and position tables. What a family is lives
in families/; how reference cases are chosen lives in reference.py.
"""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from txopt.exporter.attention import routed
from txopt.exporter.cache import DecodeState, as_transformers, collecting, decoding
from txopt.exporter.families import find
from txopt.exporter.families.family import Family
from txopt.exporter.pooling import Pooling, read_pooling
from txopt.exporter.positions import make_tables, read_by_row
from txopt.exporter.source import KV, Facts, Forward, Generated, Input, Memory
from txopt.runtime.errors import SourceError, explain

# The architecture's suffix says what an encoder alone is for.
ENCODER_TASKS = {
    "ForSequenceClassification": ("text-classification", ("logits",)),
    "ForTokenClassification": ("token-classification", ("logits",)),
}
EMBEDDING = ("embedding", ("memory", "embedding"))
# Pretraining heads, under which people keep bodies that are good for embeddings.
LANGUAGE_HEADS = ("ForMaskedLM", "ForPreTraining")
# One to start from, one to generate; a source of one token would be frozen into the graph.
LEAST_POSITIONS = 2

logger = logging.getLogger(__name__)


class HuggingFaceSource:
    """See ``source.Source``. ``module`` answers as PyTorch; ``traced`` is the copy that is exported."""

    def __init__(self, module: PreTrainedModel, family: Family, pooling: Pooling | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.family = family
        self._pooling = pooling
        self.facts = facts_of(module, family)
        _check_limits(self.facts, family)
        self.traced = _prepare(module, family)
        self._layers = _decoder_layers(module)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {item.name: value for item, value in zip(self.facts.inputs, inputs, strict=True)}
        mask = named.get("attention_mask")
        if mask is not None:
            named["attention_mask"] = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
        with routed(self.traced):
            if self.facts.kind == "encoder":
                return self._named_outputs(self.traced(**named), mask)
            memory = self.traced.get_encoder()(**named)[0]
            return memory, *self._cross_kv(memory)

    def _named_outputs(self, result: Any, mask: Tensor | None) -> tuple[Tensor, ...]:
        if "logits" in self.facts.outputs:
            return (result.logits.float(),)
        memory = result.last_hidden_state
        pooling = self._pooling or Pooling()
        return memory, pooling(memory, mask)

    def _cross_kv(self, memory: Tensor) -> list[Tensor]:
        """K, V of every layer, harvested from one dummy decoder step; all but their projections is dead code to the exporter."""
        cache = collecting(self._layers)
        start = torch.zeros(memory.shape[0], 1, dtype=torch.int64)
        self.traced(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            decoder_input_ids=start,
            decoder_attention_mask=torch.ones(memory.shape[0], 1, 1, 1, dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
        )
        return [x for layer in cache.cross_attention_cache.layers for x in (layer.keys, layer.values)]

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_masks: Sequence[Tensor | None],
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        state = DecodeState(tokens, position, list(self_kv), list(cross_kv), source_masks)
        arguments: dict[str, Any] = {"past_key_values": as_transformers(state), "use_cache": True}
        if self.family.position_argument:
            arguments[self.family.position_argument] = state.positions
        if self.facts.kind == "decoder":
            arguments |= {"input_ids": tokens, "attention_mask": state.causal}
        else:
            # The decoder asks its memory for nothing but a shape: the cross K/V are there already.
            memory = torch.zeros(tokens.shape[0], 1, self._memory_width(), dtype=self.dtype)
            arguments |= {
                "encoder_outputs": BaseModelOutput(last_hidden_state=memory),
                "decoder_input_ids": tokens,
                "decoder_attention_mask": state.causal,
            }
            if state.folded[0] is not None:
                arguments["attention_mask"] = state.folded[0]
        with routed(self.traced), decoding(state):
            logits = self.traced(**arguments).logits
        return logits.float(), state.self_kv

    def _memory_width(self) -> int:
        config = self.module.config
        return int(getattr(config, "encoder", config).hidden_size)

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        if self.facts.kind == "decoder":
            extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            out = self.module(input_ids=tokens, use_cache=True, **extra)
            return Forward((), out.logits.float(), _kv(out.past_key_values), [])
        encoded = self.module.get_encoder()(**inputs)
        arguments = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        out = self.module(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded[0]),
            decoder_input_ids=tokens,
            past_key_values=_growing_cache(),
            use_cache=True,
            **arguments,
        )
        cache = out.past_key_values
        return Forward(
            (encoded[0],), out.logits.float(), _kv(cache.self_attention_cache), _kv(cache.cross_attention_cache)
        )

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = self.module(**inputs)
        return dict(zip(self.facts.outputs, self._named_outputs(result, inputs.get("attention_mask")), strict=True))

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        # The mixin's own, which all families share: Whisper's override adds long form and cuts the prompt away.
        asked = {**options, "return_dict_in_generate": True, "output_scores": True}
        if self.facts.kind == "encoder-decoder":
            asked["past_key_values"] = _growing_cache()
        result: Any = GenerationMixin.generate(self.module, **inputs, **asked)
        return Generated(result.sequences, getattr(result, "sequences_scores", None))


def _growing_cache() -> EncoderDecoderCache:
    """A cache that grows with the layers that write to it; transformers' own has as many as the *encoder*, which fails with more."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def load(directory: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> HuggingFaceSource:
    """Reads config.json and safetensors; never a pickle, never the network.

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
    _check_architecture(architecture, family, config)
    module = _read(architecture, directory, config, dtype)
    pooling = read_pooling(directory) if family.kind == "encoder" else None
    return HuggingFaceSource(module, family, pooling)


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


def _check_architecture(architecture: Any, family: Family, config: Any) -> None:
    """Refuses a head or a decoder that the family's road does not carry, before anything is loaded."""
    name = architecture.__name__
    if family.kind == "encoder":
        fits = name.endswith((*ENCODER_TASKS, "Model")) and not getattr(config, "is_decoder", False)
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
        raise SourceError(f"config.json names the architecture {name!r}, as {kind}: expected {expected}; {advice}")
    decoder = getattr(config, "decoder", None)
    if family.decoders and decoder is not None and decoder.model_type not in family.decoders:
        crosses = getattr(decoder, "add_cross_attention", False)
        raise SourceError(
            f"config.json has a decoder of model_type {decoder.model_type!r}"
            f"{'' if crosses else ', and without cross-attention (add_cross_attention: false)'}: a {family.name} is supported "
            f"with {' or '.join(family.decoders)}; other decoders go through the custom door (docs/custom-models.md)"
        )


def _check_limits(facts: Facts, family: Family) -> None:
    """Refuses tables of positions too short for anything to be traced or generated."""
    sizes = {family.limit: facts.limit, family.source_limit: facts.source_limit}
    problems = [
        f"{name}: expected at least {LEAST_POSITIONS} positions, got {size}"
        for name, size in sizes.items()
        if name is not None and size is not None and size < LEAST_POSITIONS
    ]
    if problems:
        raise SourceError(explain("config.json has too few positions to run; use a checkpoint with more:", problems))


def _read(architecture: Any, directory: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model, every weight of it from the checkpoint; transformers would make up what is missing."""
    try:
        module, report = architecture.from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as err:  # transformers and safetensors raise a dozen kinds
        reason = str(err).strip().split("\n")[0]
        raise SourceError(f"{directory}: transformers cannot load it as {architecture.__name__}: {reason}") from err
    # An encoder's pooler feeds no output here, and many checkpoints leave it out.
    wanting = sorted(
        name for name in report["missing_keys"] if "pooler." not in name or not architecture.__name__.endswith("Model")
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


def _prepare(module: PreTrainedModel, family: Family) -> Any:
    """The copy that is traced: same weights, the family's hook and position table in place."""
    tensors = [*module.parameters(), *module.buffers()]
    traced = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    read_by_row(traced, family.positions)
    return traced if family.hook is None else family.hook(traced)


def facts_of(module: PreTrainedModel, family: Family) -> Facts:
    """What ``module``'s configurations say; its weights are not asked."""
    config = module.config
    task = family.task
    outputs: tuple[str, ...] = ()
    if family.kind == "encoder":
        name = type(module).__name__
        task, outputs = next((value for suffix, value in ENCODER_TASKS.items() if name.endswith(suffix)), EMBEDDING)
    text = config.get_text_config(decoder=True) if family.kind != "encoder" else config
    vocabulary = int(getattr(text, "decoder_vocab_size", None) or text.vocab_size)
    inputs = tuple(_sized(item, config) for item in family.inputs)
    return Facts(
        kind=family.kind,
        task=task,
        family=family.name,
        inputs=inputs,
        generation=_generation(module),
        vocabulary=vocabulary,
        source_vocabulary=int(getattr(config, "vocab_size", None) or vocabulary),
        limit=_value(config, family.limit),
        source_limit=_value(config, family.source_limit),
        memories=(_memory(inputs),) if family.kind == "encoder-decoder" else (),
        outputs=outputs,
        labels={str(k): str(v) for k, v in config.id2label.items()} if outputs == ("logits",) else None,
        scores=_scores(config, task) if outputs == ("logits",) else None,
    )


def _memory(inputs: Sequence[Input]) -> Memory:
    """The one that a family has: as long as its inputs, where their length varies."""
    mask = next((item.name for item in inputs if item.name == "attention_mask"), None)
    return Memory(axis="T" if any("T" in item.axes for item in inputs) else None, mask=mask)


def _scores(config: Any, task: str) -> str:
    """As transformers' pipelines read a configuration."""
    if task == "token-classification":
        return "softmax"
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def _sized(item: Input, config: Any) -> Input:
    named = {"B", "T"}
    return Input(
        name=item.name,
        dtype=item.dtype,
        axes=tuple(axis if axis in named or isinstance(axis, int) else _value(config, axis) for axis in item.axes),  # type: ignore[misc]
    )


def _value(config: Any, expression: str | None) -> int | None:
    """A size out of the configuration: "a", "sub.a", "2*a", "a-b-1", or "a.0" and "a.1", which are the same where a is one number."""
    if expression is None:
        return None
    factor, _, rest = expression.rpartition("*")
    terms = rest.split("-")
    numbers = [int(term) if re.fullmatch(r"\d+", term) else _attribute(config, term) for term in terms]
    return int(factor or 1) * (numbers[0] - sum(numbers[1:]))


def _attribute(config: Any, path: str) -> int:
    value = config
    for name in path.split("."):
        if name.isdigit():
            value = value[int(name)] if isinstance(value, (list, tuple)) else value
        elif not hasattr(value, name):
            raise SourceError(
                f"config.json has no {path}, a size that txopt needs; a model of another kind goes through the custom door "
                "(docs/custom-models.md)"
            )
        else:
            value = getattr(value, name)
    return int(value)


def _generation(module: PreTrainedModel) -> dict[str, Any]:
    config = getattr(module, "generation_config", None)
    if config is None:
        return {}
    facts = {k: v for k, v in config.to_diff_dict().items() if v is not None and not k.startswith("_")}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        if (value := getattr(config, name, None)) is not None:
            facts[name] = value
    facts.pop("transformers_version", None)
    return facts


def _decoder_layers(module: PreTrainedModel) -> int:
    config = module.config
    decoder = getattr(config, "decoder", config)
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return int(next(value for name in names if (value := getattr(decoder, name, None)) is not None))


def _kv(cache: Any) -> list[KV]:
    return [(layer.keys, layer.values) for layer in cache.layers]
