"""A sentencepiece model whose ids come from a vocab.json (Marian, M2M100), as one tokenizers file.

Owns the translation of sentencepiece's normalisation, segmentation and decoding into a ``tokenizers.Tokenizer``. It
knows neither checkpoints nor manifests.

The two id spaces rarely cover each other, and each mismatch has its rule:

1. A piece of both: its vocab.json id.
2. A piece of vocab.json alone (the other language's): it keeps its id and is decoded, but no segmentation finds it: it
   stands under ``MARK``, which no text contains. Text that sentencepiece does not know still becomes it where the whole
   unknown stretch is such a piece; whoever feeds the model looks MARK + stretch up.
3. A piece of sentencepiece alone: segmentation needs it, the model has no embedding for it. It gets an id from
   ``unknown_from`` on, which whoever feeds the model must replace by the unknown token.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from txopt.runtime.errors import MissingDependencyError, SourceError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type
# Neither is a character. The normaliser writes the second for the first, so that no text contains the mark.
MARK = "\U0010ffff"
_STRANGER = "\U0010fffe"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """``tokenizer`` gives ids; those from ``unknown_from`` on mean "unknown" (rule 3)."""

    tokenizer: Tokenizer
    unknown_from: int


def convert(spm: Path, vocabulary: Path, *, special: Sequence[str], extra: Iterable[tuple[str, int]] = ()) -> Converted:
    """One sentencepiece model and its vocab.json as a tokenizer.

    Args:
        special: tokens that decoding skips; each must be in the vocabulary or in ``extra``.
        extra: special tokens with ids after the vocabulary's, such as M2M100's languages.

    Raises:
        SourceError: not a sentencepiece model, one of an unsupported type, or a vocabulary whose ids have gaps.
        MissingDependencyError: sentencepiece or protobuf is not installed.
    """
    proto = _read(spm)
    ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
    ids.update(extra)
    if sorted(ids.values()) != list(range(len(ids))):
        raise SourceError(f"{vocabulary.name}: expected ids 0 to {len(ids) - 1}, each once, found gaps or repeats")
    unk = proto.trainer_spec.unk_piece
    if unk not in ids:
        raise SourceError(f"{vocabulary.name}: expected the unknown token {unk!r} of {spm.name}, found no such entry")
    kind = proto.trainer_spec.model_type
    keep = {*special, unk}
    if kind == _UNIGRAM:
        tokenizer = Tokenizer(_unigram(proto, ids, unk, keep))
    elif kind == _BPE:
        tokenizer = Tokenizer(_bpe(proto, ids, unk, keep))
    else:
        raise SourceError(f"{spm.name}: expected a unigram or BPE sentencepiece model, found type {kind}")
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED and piece.piece in ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in symbols if token not in special]
    )
    _dress(tokenizer, proto)
    return Converted(tokenizer=tokenizer, unknown_from=len(ids))


def _unigram(proto: Any, ids: dict[str, int], unk: str, keep: set[str]) -> models.Unigram:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    lowest = min(scores.values(), default=0.0)  # sentencepiece's unknown costs ten more than the rarest piece
    vocabulary: list[tuple[str, float]] = [("", 0.0)] * len(ids)
    for token, index in ids.items():
        vocabulary[index] = (token if token in scores or token in keep else MARK + token, scores.get(token, lowest))
    vocabulary.extend((token, score) for token, score in scores.items() if token not in ids)
    return models.Unigram(vocabulary, ids[unk], False)


def _bpe(proto: Any, ids: dict[str, int], unk: str, keep: set[str]) -> models.BPE:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    vocabulary = {token if token in scores or token in keep else MARK + token: index for token, index in ids.items()}
    for token in scores:
        vocabulary.setdefault(token, len(vocabulary))
    # sentencepiece merges by the score of the result; the order among equal results never decides between results
    merges = [
        (-score, index, (token[:cut], token[cut:]))
        for index, (token, score) in enumerate(scores.items())
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return models.BPE(vocab=vocabulary, merges=[pair for _, _, pair in sorted(merges)], unk_token=unk, fuse_unk=True)


def _dress(tokenizer: Tokenizer, proto: Any) -> None:
    """Normaliser, pre-tokenizer and decoder."""
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Replace(MARK, _STRANGER)]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    pieces = {piece.piece for piece in proto.pieces}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE,
        prepend_scheme="always" if spec.add_dummy_prefix else "never",
        # Word by word is faster, and the same where no piece reaches over a space and a lone space is a piece.
        split=_SPACE in pieces and not any(_SPACE in piece[1:] for piece in pieces),
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, ""),
            decoders.Replace(_SPACE, " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"\A\s+|\s+\z"), ""),  # decoders.Strip fails where nothing but spaces is left
        ]
    )


def _read(spm: Path) -> Any:
    try:
        proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()  # neither has types
        decode_error = import_module("google.protobuf.message").DecodeError
    except ImportError as err:
        raise MissingDependencyError(
            f"{spm.name} needs sentencepiece: pip install sentencepiece protobuf ({err})"
        ) from err
    try:
        proto.ParseFromString(spm.read_bytes())
    except decode_error as err:
        raise SourceError(f"{spm.name}: expected a sentencepiece model, found something else: {err}") from err
    if not proto.pieces:
        raise SourceError(f"{spm.name}: expected a sentencepiece model, found one without pieces")
    return proto
