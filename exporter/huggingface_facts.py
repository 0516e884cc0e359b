"""What a transformers configuration says of a model: its ``Facts``. Nothing here asks a weight."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from txopt.exporter.families.family import Family
from txopt.exporter.framing import Framing
from txopt.exporter.source import Facts, Input, Memory
from txopt.runtime.errors import SourceError, explain

# The architecture's suffix says what an encoder alone is for.
ENCODER_TASKS = {
    "ForSequenceClassification": ("text-classification", ("logits",)),
    "ForTokenClassification": ("token-classification", ("logits",)),
}
EMBEDDING = ("embedding", ("memory", "embedding"))
# One to start from, one to generate; a source of one token would be frozen into the graph.
LEAST_POSITIONS = 2


def facts_of(module: PreTrainedModel, family: Family) -> Facts:
    """What ``module``'s configurations say; its weights are not asked."""
    config = module.config
    task = family.task
    outputs: tuple[str, ...] = ()
    if family.kind == "encoder":
        name = known_as(type(module))
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
        source_vocabulary=int(
            getattr(config, "src_vocab_size", None) or getattr(config, "vocab_size", None) or vocabulary
        ),
        limit=_value(config, family.limit),
        source_limit=_value(config, family.source_limit),
        framing=_framing(config, family.convolutions),
        memories=(_memory(inputs),) if family.kind == "encoder-decoder" else (),
        outputs=outputs,
        labels={str(k): str(v) for k, v in config.id2label.items()} if outputs == ("logits",) else None,
        scores=_scores(config, task) if outputs == ("logits",) else None,
    )


def known_as(kind: type) -> str:
    """The name of the class of transformers that ``kind`` is or extends, which says what the model is for."""
    return next((each.__name__ for each in kind.__mro__ if each.__module__.startswith("transformers.")), kind.__name__)


def _memory(inputs: Sequence[Input]) -> Memory:
    """The one that a family has: as long as its inputs, where their length varies."""
    mask = next((item.name for item in inputs if item.name == "attention_mask"), None)
    return Memory(axis="T" if any({"T", "N"} & set(item.axes) for item in inputs) else None, mask=mask)


def _scores(config: Any, task: str) -> str:
    """As transformers' pipelines read a configuration."""
    if task == "token-classification":
        return "softmax"
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def _framing(config: Any, lists: tuple[str, str] | None) -> Framing | None:
    if lists is None:
        return None
    kernels, strides = (getattr(config, name) for name in lists)
    return Framing(tuple((int(kernel), int(stride)) for kernel, stride in zip(kernels, strides, strict=True)))


def _sized(item: Input, config: Any) -> Input:
    named = {"B", "T", "N"}
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
                f"the model's configuration has no {path}, a size that txopt needs; a model of another kind goes through the custom "
                "door (docs/custom-models.md)"
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


def check_limits(facts: Facts, family: Family) -> None:
    """Refuses tables of positions too short for anything to be traced or generated, and tokens that the model does not have."""
    beyond = [
        f"{name}: expected a token below {facts.vocabulary}, the size of the vocabulary, got {token}"
        for name in ("bos_token_id", "decoder_start_token_id", "pad_token_id")
        if facts.kind != "encoder"
        and isinstance(token := facts.generation.get(name), int)
        and token >= facts.vocabulary
    ]
    if beyond:
        raise SourceError(
            explain("the model's configuration names tokens that it does not have; set them in it, or to None:", beyond)
        )
    sizes = {family.limit: facts.limit, family.source_limit: facts.source_limit}
    problems = [
        f"{name}: expected at least {LEAST_POSITIONS} positions, got {size}"
        for name, size in sizes.items()
        if name is not None and size is not None and size < LEAST_POSITIONS
    ]
    if problems:
        raise SourceError(
            explain("the model's configuration has too few positions to run; use a model with more:", problems)
        )
