"""What a module of one's own says of itself: read once, every problem with it told at once.

Owns the types and ranges of the attributes that docs/custom-models.md lists, but for those of inputs (custom_inputs.py). Whether
they are true, a trial call tells (custom_source.py).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from txopt.exporter import custom_inputs
from txopt.exporter.calls import calling
from txopt.exporter.custom_inputs import Masks, is_whole
from txopt.exporter.source import Input
from txopt.runtime.errors import SourceError, explain

SPECIAL_IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
_FACTS = ("special_ids", "max_length", "max_source_length", "source_vocabulary", "inputs", "memory_masks", "tokenizers")
_ID = "a whole number of at least 0"
# One to start from, one to generate; a source of one token would be frozen into the graph.
_LEAST_POSITIONS = 2


@dataclass(frozen=True, kw_only=True)
class CustomFacts:
    """``special_ids`` as the manifest keeps them: numbers, and for ``eos_token_id`` a number or a list of them.

    ``inputs`` are encode()'s, in its order; ``masks`` names one of them for each memory, None for one that is never padded.
    """

    special_ids: Mapping[str, Any]
    limit: int | None
    source_limit: int | None
    source_vocabulary: int
    inputs: tuple[Input, ...]
    masks: Masks

    @property
    def eos_ids(self) -> list[int]:
        return _listed(self.special_ids["eos_token_id"])


def read(module: Any) -> CustomFacts:
    """The facts of ``module``.

    Raises:
        SourceError: no nn.Module, methods or facts missing, or facts of another type than docs/custom-models.md says.
    """
    problems = []
    if not isinstance(module, nn.Module):
        problems.append(f"expected an nn.Module, got {type(module).__name__}")
    problems += [f"no method {name}()" for name in ("encode", "decode") if not callable(getattr(module, name, None))]
    _ask_properties(module)
    special: Any = getattr(module, "special_ids", None)
    problems += _special_problems(special)
    problems += custom_inputs.problems(module)
    vocabulary = _source_vocabulary(module)
    if not is_whole(vocabulary, 1):
        problems.append(
            "source_vocabulary: expected the number of source ids, a whole number of at least 1, "
            + (
                "got none, and the module has no nn.Embedding to read it from"
                if vocabulary is None
                else f"got {vocabulary!r}"
            )
        )
    limit = getattr(module, "max_length", None)
    source_limit = getattr(module, "max_source_length", limit)
    for name, value in (("max_length", limit), ("max_source_length", getattr(module, "max_source_length", None))):
        if value is not None and not is_whole(value, _LEAST_POSITIONS):
            problems.append(f"{name} must be a number of at least {_LEAST_POSITIONS}, or absent, got {value!r}")
    if problems:
        raise SourceError(explain("this is no custom encoder-decoder (see docs/custom-models.md):", problems))
    ids = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in special.items()}
    inputs, masks = custom_inputs.read(module, vocabulary, source_limit)
    return CustomFacts(
        special_ids=ids,
        limit=limit,
        source_limit=next((item.limit for item in inputs if item.name == custom_inputs.IDS), source_limit),
        source_vocabulary=vocabulary,
        inputs=inputs,
        masks=masks,
    )


def _ask_properties(module: Any) -> None:
    """Raises SourceError where a fact is a property that fails: after an AttributeError nn.Module says that there is no such fact."""
    for name in _FACTS:
        said = inspect.getattr_static(type(module), name, None)
        if isinstance(said, property) and said.fget is not None:
            with calling(
                f"{name} cannot be read off {type(module).__name__}", "mend this property (docs/custom-models.md)"
            ):
                said.fget(module)


def _special_problems(special: Any) -> list[str]:
    if not isinstance(special, Mapping):
        return ["no special_ids: a mapping with " + ", ".join(SPECIAL_IDS)]
    problems = [f"special_ids has no {name}" for name in SPECIAL_IDS if name not in special]
    for name, value in special.items():
        several = name == "eos_token_id"
        fits = bool(_listed(value)) and all(is_whole(each, 0) for each in _listed(value))
        if fits and (several or not isinstance(value, (list, tuple))):
            continue
        expected = f"{_ID}, or a list of them" if several else _ID
        advice = ", or the end of sequence's where nothing else pads" if name == "pad_token_id" else ""
        problems.append(f"special_ids[{name!r}]: expected {expected}, got {value!r}; give the token's id{advice}")
    return problems


def _source_vocabulary(module: Any) -> Any:
    """What the module says of its ``input_ids``, else the rows of its smallest embedding; 1 where declared inputs hold no such ids."""
    if isinstance(declared := getattr(module, "inputs", None), Mapping):
        said = declared.get(custom_inputs.IDS, {"vocabulary": 1})
        return said.get("vocabulary", 1) if isinstance(said, Mapping) else 1
    said = getattr(module, "source_vocabulary", None)
    if said is not None or not isinstance(module, nn.Module):
        return said
    return min((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
