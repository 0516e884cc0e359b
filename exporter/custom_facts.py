"""What a module of one's own says of itself: read once, every problem with it told at once.

Owns the types and ranges of the attributes that docs/custom-models.md lists. Whether they are true, a trial call tells
(custom_source.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from txopt.runtime.errors import SourceError, explain

SPECIAL_IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
_ID = "a whole number of at least 0"
# One to start from, one to generate; a source of one token would be frozen into the graph.
_LEAST_POSITIONS = 2


@dataclass(frozen=True, kw_only=True)
class CustomFacts:
    """``special_ids`` as the manifest keeps them: numbers, and for ``eos_token_id`` a number or a list of them."""

    special_ids: Mapping[str, Any]
    limit: int | None
    source_limit: int | None
    source_vocabulary: int

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
    special: Any = getattr(module, "special_ids", None)
    problems += _special_problems(special)
    vocabulary = _source_vocabulary(module)
    if not _is_whole(vocabulary, 1):
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
        if value is not None and not _is_whole(value, _LEAST_POSITIONS):
            problems.append(f"{name} must be a number of at least {_LEAST_POSITIONS}, or absent, got {value!r}")
    if problems:
        raise SourceError(explain("this is no custom encoder-decoder (see docs/custom-models.md):", problems))
    ids = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in special.items()}
    return CustomFacts(special_ids=ids, limit=limit, source_limit=source_limit, source_vocabulary=vocabulary)


def _special_problems(special: Any) -> list[str]:
    if not isinstance(special, Mapping):
        return ["no special_ids: a mapping with " + ", ".join(SPECIAL_IDS)]
    problems = [f"special_ids has no {name}" for name in SPECIAL_IDS if name not in special]
    for name, value in special.items():
        several = name == "eos_token_id"
        fits = bool(_listed(value)) and all(_is_whole(each, 0) for each in _listed(value))
        if fits and (several or not isinstance(value, (list, tuple))):
            continue
        expected = f"{_ID}, or a list of them" if several else _ID
        advice = ", or the end of sequence's where nothing else pads" if name == "pad_token_id" else ""
        problems.append(f"special_ids[{name!r}]: expected {expected}, got {value!r}; give the token's id{advice}")
    return problems


def _source_vocabulary(module: Any) -> Any:
    """What the module says, else the rows of its smallest embedding."""
    said = getattr(module, "source_vocabulary", None)
    if said is not None or not isinstance(module, nn.Module):
        return said
    return min((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=None)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
