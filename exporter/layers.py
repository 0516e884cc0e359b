"""Which layer of its model a node or weight belongs to, and which part of the layer it is, as far as its name tells.

It knows the ways in which exporters write names, and no graph:

    encoder.0/Attention_25                                  encoder.0
    model.decoder.layers.3.self_attn.q.weight               decoder.3
    /model/encoder/layers.0/self_attn/MatMul                encoder.0
    tf_bert/bert/encoder/layer_._4/attention/Softmax        tf_bert.bert.encoder.4
    encoder.final_layer_norm.weight, /lm_head/MatMul        outside of layers
    onnx::MatMul_123, Softmax_7, val_94                     nothing is told
"""

import re
from dataclasses import dataclass

OUTSIDE = ""

_STACK = re.compile(r"\w*(layer|block|encoder|decoder|stage)s?|h", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"\d{1,4}", re.ASCII)
_NUMBERED = re.compile(r"(\w+?)_+(\d{1,4})", re.ASCII)
_OPERATOR = re.compile(r".*(_\d+|::.*)|node_.*", re.ASCII | re.DOTALL)  # fusions name nodes after those they replace
_GENERIC = frozenset({"model", "module", "layers", "layer", "blocks", "block", "h"})
_TRANSPOSED = ".T"  # what graph.transpose_weights appends
_JOINED = "|"  # what fusion/qkv.py puts between the names of the weights it joins


@dataclass(frozen=True)
class _Path:
    """A name in parts: those that lead to the layer, its number, those inside it; the last part of a name is in none of them."""

    stack: tuple[str, ...]
    number: int | None
    inside: tuple[str, ...]


def layer_of(name: str) -> str | None:
    """The layer, as "decoder.3"; OUTSIDE where the name tells a place that is in none; None where it tells nothing.

    The number is the first one behind a word for a stack of layers (layers, block, h, encoder, ...), else the first of all.
    """
    for part in name.split(_JOINED):
        path = _path(part)
        if path.number is not None:
            words = [word for word in path.stack if word not in _GENERIC] or [*path.stack[-1:]] or ["layer"]
            kept = [word for index, word in enumerate(words) if word not in words[:index]]
            return ".".join([*kept, str(path.number)])
    scope = [word for word in _path(name).inside if not _OPERATOR.fullmatch(word)]
    return OUTSIDE if scope or name.startswith("/") else None


def stack_of(layer: str) -> tuple[str, int]:
    """("decoder", 3) of "decoder.3": equal layers of one model differ in the number alone."""
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def part_of(name: str) -> str:
    """What the name says beside its layer and its last word: "self_attn.q_proj"; of a name that tells neither, all of it."""
    paths = [_path(part) for part in name.split(_JOINED)]
    told = list(dict.fromkeys(".".join(path.inside) for path in paths if path.inside))
    if not told:
        return "" if any(path.number is not None for path in paths) else name
    scope, dot, _ = told[0].rpartition(".")
    if len(told) > 1 and all(part.startswith(scope + dot) for part in told):
        return scope + dot + _JOINED.join(part.removeprefix(scope + dot) for part in told)
    return _JOINED.join(told)


def _path(name: str) -> _Path:
    words = _words(name.removesuffix(_TRANSPOSED))
    numbers = [index for index, word in enumerate(words) if _NUMBER.fullmatch(word)]
    behind_stack = [index for index in numbers if index and _STACK.fullmatch(words[index - 1])]
    found = next(iter([*behind_stack, *(index for index in numbers if index), *numbers]), None)
    if found is None:
        return _Path((), None, words)
    return _Path(words[:found], int(words[found]), words[found + 1 :])


def _words(name: str) -> tuple[str, ...]:
    """Without the last, which is the operator's or the tensor's own; "layer_3" and "layer_._3" are two words."""
    words: list[str] = []
    for word in re.split(r"[./]+", name.strip("./"))[:-1]:
        numbered = _NUMBERED.fullmatch(word)
        if numbered and _STACK.fullmatch(numbered[1]):
            words += numbered.groups()
        else:
            words.append(word.strip("_") if _NUMBER.fullmatch(word.strip("_")) or word.endswith("_") else word)
    return tuple(word for word in words if word)
