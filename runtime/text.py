"""Text in and text out through an artifact's tokenizer files.

Owns tokenization, special tokens, language tokens, truncation, padding and the way back from ids. It does not know
which model reads the ids: where a language token goes and what an id means is data in the manifest's "frontend".

Keys of "frontend" read here, all optional but the first:

    tokenizer                     file of the source tokenizer; the target's too where ``target_tokenizer`` is absent
    target_tokenizer              file of the target tokenizer
    add_special_tokens            whether the tokenizer's own template applies ([CLS] ... [SEP]); true where absent
    max_source_length             longest source in tokens, special tokens included; no bound where absent
    pad_token_id, padding_side    what fills the short rows of a batch (0), and on which side ("right")
    languages                     {code: token id}
    source_template               instead of the tokenizer's own template: a list of ids and of the words "text",
                                  "source_language" and "target_language"
    source_language, target_language    defaults for the two; a word without a language is left out of the template
    language_marks                [before, after]: a text may begin with its own target language between the two
    unknown_from, unk_token_id    source ids from ``unknown_from`` on mean "unknown" and become ``unk_token_id``
    unknown_prefix                an unknown stretch of text is the token prefix + stretch where there is such a token
    clean_up_tokenization_spaces  whether decoding removes the spaces before punctuation; false where absent
    timestamp_begin               decoding leaves out this id and all above it
"""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txopt.runtime.errors import ArtifactError, InputError, explain

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

logger = logging.getLogger(__name__)

# In this order, as transformers' clean_up_tokenization does it.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_CLEANED_NEIGHBOURS = {found[place : place + 2] for found, _ in _CLEAN_UP for place in range(len(found) - 1)}
_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's tokens for what its vocabulary does not know


class TextDecoder:
    """Ids to text, for every front end whose "frontend" names a tokenizer, whatever the source is."""

    def __init__(self, directory: Path, frontend: Mapping[str, Any]) -> None:
        """Opens the target's tokenizer.

        Raises:
            InputError: the artifact has no tokenizer.
            ArtifactError: the file is not a tokenizer that the installed ``tokenizers`` reads, or it leaves a text no room.
        """
        name = frontend.get("target_tokenizer") or frontend.get("tokenizer")
        if name is None:
            raise InputError("this artifact has no tokenizer: give it arrays of ids and read the ids it returns")
        self._tokenizer = _open(directory / name)
        self._clean_up = bool(frontend.get("clean_up_tokenization_spaces", False))
        self._timestamp_begin: int | None = frontend.get("timestamp_begin")
        self._unknown_from: int | None = frontend.get("unknown_from")
        self._prefix: str | None = frontend.get("unknown_prefix")
        self._unknown = int(frontend.get("unk_token_id") or 0)
        own_target = "target_tokenizer" in frontend
        self._target_unknown_from = None if own_target else self._unknown_from
        # A template of the source's words is not the target's; a speech model's tokenizer repeats the prompt in its own.
        templated = frontend.get("source_template") is not None and not own_target
        self._target_special = (
            bool(frontend.get("add_special_tokens", True)) and not templated and frontend.get("type") != "audio"
        )

    @property
    def vocabulary(self) -> int:
        """How many ids the tokenizer has."""
        return self._tokenizer.get_vocab_size()

    def written(self, text: str) -> list[int]:
        """The ids in which the target's tokenizer writes ``text``, with the special tokens of its own template, without languages.

        What a decoder starts from, and what the generation forces upon it, is not known here.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=self._target_special)
        ids, beyond = self._known(self._tokenizer, text, encoding), self._target_unknown_from
        return ids if beyond is None else [self._unknown if token >= beyond else token for token in ids]

    def decode(self, ids: ArrayLike) -> str:
        """The text of one sequence, int [L]: what transformers' decode(skip_special_tokens=True) says.

        Raises:
            InputError: not one sequence of integers, or a negative one.
        """
        return self._cleaned(self._tokenizer.decode(self._read(ids), skip_special_tokens=True))

    def settled(self, ids: ArrayLike) -> str:
        """The beginning of ``decode(ids)`` that no token after them changes: what a stream may say already."""
        kept = self._read(ids)
        # Bytes beside bytes are read together: one that does not fit makes them all unreadable. Nothing is said between.
        while kept and self._is_byte_or_silent(kept[-1]):
            kept.pop()
        text = self._tokenizer.decode(kept, skip_special_tokens=True).rstrip(_HALF_A_CHARACTER)
        return self._cleaned(text[: _joint(text)] if self._clean_up else text)

    def decode_batch(self, sequences: Sequence[ArrayLike] | NDArray[np.integer[Any]]) -> list[str]:
        """One text per row."""
        return [self.decode(row) for row in sequences]

    def _read(self, ids: ArrayLike) -> list[int]:
        """The ids that are read, checked."""
        row = np.asarray(ids)
        if row.ndim != 1 or (row.size and (row.dtype.kind not in "iu" or row.min() < 0)):
            raise InputError(
                f"expected one sequence of token ids, integers >= 0 of shape [L]; found {row.dtype} {list(row.shape)}"
                + (", some negative; remove the padding first" if row.ndim == 1 and row.dtype.kind == "i" else "")
            )
        kept: list[int] = row.tolist()
        if self._timestamp_begin is not None:
            kept = [token for token in kept if token < self._timestamp_begin]
        return kept

    def _known(self, tokenizer: "Tokenizer", text: str, encoding: "Encoding") -> list[int]:
        """The ids of a text, unknown stretches looked up once more."""
        ids = encoding.ids
        if self._prefix is None or self._unknown not in ids:
            return ids
        unknown = tokenizer.id_to_token(self._unknown)
        for position, (token, span) in enumerate(zip(encoding.tokens, encoding.offsets, strict=True)):
            if ids[position] == self._unknown:
                stretch = text[slice(*span)] if token == unknown else token  # BPE says <unk>, Unigram what it is
                found = tokenizer.token_to_id(self._prefix + stretch)
                ids[position] = self._unknown if found is None else found
        return ids

    def _cleaned(self, text: str) -> str:
        if self._clean_up:
            for found, replacement in _CLEAN_UP:
                text = text.replace(found, replacement)
        return text

    def _is_byte_or_silent(self, token: int) -> bool:
        word = self._tokenizer.id_to_token(token)
        return word is None or token in self._special_ids or _BYTE.fullmatch(word) is not None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special)


class TextFrontend(TextDecoder):
    """Texts to ids and back."""

    def __init__(self, directory: Path, frontend: Mapping[str, Any]) -> None:
        """Opens the tokenizers that "frontend" names (see the module's docstring); errors as ``TextDecoder``."""
        super().__init__(directory, frontend)
        self._source = _open(directory / frontend["tokenizer"])
        self._languages: dict[str, int] = dict(frontend.get("languages") or {})
        self._template: list[int | str] | None = frontend.get("source_template")
        self._defaults = {key: frontend.get(key) for key in ("source_language", "target_language")}
        self._special = bool(frontend.get("add_special_tokens", True)) and self._template is None
        self._limit: int | None = frontend.get("max_source_length")
        self._pad = int(frontend.get("pad_token_id") or 0)
        self._pad_left = frontend.get("padding_side", "right") == "left"
        self._marks: list[str] | None = frontend.get("language_marks")
        if self._limit is not None:
            room = self._limit - (len(self._template) - 1 if self._template else 0)
            special = self._source.num_special_tokens_to_add(False) if self._special else 0
            if room <= special:
                raise ArtifactError(
                    f"frontend.max_source_length: expected room for a token beside the {special + self._limit - room} that "
                    f"the tokenizer puts around a text, found {self._limit}; export the artifact again"
                )
            self._source.enable_truncation(max_length=room)

    @property
    def languages(self) -> dict[str, int]:
        """Language codes this artifact knows, with their token ids; empty where it has no language tokens."""
        return dict(self._languages)

    def encode(
        self,
        texts: Sequence[str],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        truncation: bool = True,
    ) -> dict[str, NDArray[np.int64]]:
        """Feeds for the encoder.

        Args:
            texts: B texts.
            source_language, target_language: codes out of ``languages``; the artifact's defaults where None.
            truncation: cut texts longer than the model reads, with a logged warning; False: refuse them.

        Returns:
            input_ids and attention_mask (1: token, 0: padding), both int64 [B,T].

        Raises:
            InputError: no text, something that is not text, a text without tokens, an unknown language, or a text that
                is too long where ``truncation`` is off. All problems are listed at once.
        """
        if isinstance(texts, str):
            texts = [texts]
        problems = [
            f"text {index}: expected str, found {type(text).__name__}"
            for index, text in enumerate(texts)
            if not isinstance(text, str)
        ]
        problems += [
            f"text {index}: expected text that UTF-8 can write, found lone surrogates (undecodable bytes?)"
            for index, text in enumerate(texts)
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text)
        ]
        if not texts:
            problems.append("expected at least one text, found none")
        if problems:
            raise InputError(explain("these texts cannot be encoded:", problems))
        source = self._language(source_language, "source_language")
        target = self._language(target_language, "target_language")
        parts = [self._marked(text, target) for text in texts]
        encodings = self._source.encode_batch([text for text, _ in parts], add_special_tokens=self._special)
        rows = []
        for index, encoding in enumerate(encodings):
            text, own = parts[index]
            prefix, suffix = self._around(source, own)
            rows.append([*prefix, *self._known(self._source, text, encoding), *suffix])
            if not rows[-1]:
                problems.append(f"text {index}: {texts[index]!r} has no tokens; leave it out")
            if encoding.overflowing:
                length = len(prefix) + len(suffix) + _length(encoding)
                if truncation:
                    logger.warning(
                        "text %d: %d tokens were cut to %s, all that the model reads", index, length, self._limit
                    )
                else:
                    problems.append(f"text {index}: {length} tokens, the model reads {self._limit}; shorten or cut it")
        if problems:
            raise InputError(explain("these texts cannot be encoded:", problems))
        return self._padded(rows)

    def forced_bos_token_id(self, target_language: str | None = None) -> int | None:
        """The token that generation must start with to write ``target_language`` (None: the artifact's default).

        None where the target language is said in the source, or where there is no choice.

        Raises:
            InputError: a language that the artifact does not know.
        """
        if self._template is not None and "target_language" in self._template:
            return None
        return self._language(target_language, "target_language")

    def _marked(self, text: str, target: int | None) -> tuple[str, int | None]:
        """A text without the language in front of it, and the target language's id."""
        if self._marks is None or not text.startswith(self._marks[0]):
            return text, target
        code, mark, rest = text[len(self._marks[0]) :].partition(self._marks[1])
        if not mark:
            return text, target
        if code not in self._languages:
            logger.warning(
                "the model has no token for the language %r in front of a text; it reads it as unknown", code
            )
        return rest, self._languages.get(code, self._unknown)

    def _around(self, source: int | None, target: int | None) -> tuple[list[int], list[int]]:
        """Ids before and after the text."""
        ids = {"source_language": source, "target_language": target}
        around: tuple[list[int], list[int]] = ([], [])
        side = 0
        for item in self._template or []:
            if item == "text":
                side = 1
            elif isinstance(item, int):
                around[side].append(item)
            elif (token := ids[item]) is not None:
                around[side].append(token)
        return around

    def _language(self, code: str | None, key: str) -> int | None:
        chosen = code if code is not None else self._defaults[key]
        if chosen is None:
            return None
        if chosen in self._languages:
            return self._languages[chosen]
        if not self._languages:
            raise InputError(f"{key}={chosen!r}: this model has no language tokens; leave the language out")
        close = difflib.get_close_matches(chosen, self._languages, n=3, cutoff=0.5) or sorted(self._languages)[:8]
        raise InputError(
            f"{key}={chosen!r}: expected one of this model's {len(self._languages)} language codes, such as "
            + ", ".join(close)
        )

    def _padded(self, rows: list[list[int]]) -> dict[str, NDArray[np.int64]]:
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self._pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            start = width - len(row) if self._pad_left else 0
            ids[index, start : start + len(row)] = row
            mask[index, start : start + len(row)] = 1
        if self._unknown_from is not None:
            ids[ids >= self._unknown_from] = self._unknown
        return {"input_ids": ids, "attention_mask": mask}


def _joint(text: str) -> int:
    """The last place of ``text`` where cutting it in two changes nothing about its clean-up, 0 where there is none.

    Clean-up only takes spaces away, so two neighbours that are no spaces stay neighbours, and a replacement that spans
    them has both in it.
    """
    for place in range(len(text) - 1, 0, -1):
        neighbours = text[place - 1 : place + 1]
        if " " not in neighbours and neighbours not in _CLEANED_NEIGHBOURS:
            return place
    return 0


def _length(encoding: "Encoding") -> int:
    """Tokens of a text before it was cut; every part repeats the special tokens."""
    special = sum(encoding.special_tokens_mask)
    return special + sum(len(part.ids) - special for part in [encoding, *encoding.overflowing])


def _open(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # what tokenizers raises is a bare Exception
        raise ArtifactError(f"{path.name}: expected a tokenizer file, found {err}; export the artifact again") from err
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
