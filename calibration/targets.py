"""Reference texts as the ids a decoder should say, for teacher forcing.

Owns what comes around the text: the token that generation forces first, the end, and how long it may be. How a text becomes ids is
runtime/text.py's (``written``), what the decoder starts from is the manifest's "generation" or a speech model's prompt.

The decoder is fed prompt + labels[:-1]; its answers from the prompt's last place on are about labels. So labels are what generate()
would have to append to the prompt:

    [forced_bos_token_id]  [the template's beginning]  text  [the template's end]  eos_token_id

each once: a first token that the prompt or the forced one says already is not said again. Where a tokenizer's template has a beginning
(BART's <s>), so had the targets that the model was trained on, and it says it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError
from txopt.runtime.manifest import Manifest
from txopt.runtime.options import GenerationOptions
from txopt.runtime.text import TextDecoder

Ids = NDArray[np.int64]

IGNORED = -100  # transformers' label of what is not one


class Targets:
    """Texts to labels, and labels that were given checked; of an artifact with a decoder.

    Args:
        manifest: the artifact's.
        decoder: its tokenizer's way back, None where it has none.
        options: the call's generation options, as a pipeline's prepare() gave them.
    """

    def __init__(self, manifest: Manifest, decoder: TextDecoder | None, options: Mapping[str, Any]) -> None:
        if manifest.cache is None:
            raise ValueError("a model without a decoder has no targets")
        merged = GenerationOptions.merge(manifest.generation, options)
        logits = next(item for item in manifest.graphs["decoder"].outputs if item.name == "logits")
        self._vocabulary = int(logits.axes[-1])
        self._most, self._decoder = manifest.cache.max_length, decoder
        self._starts = merged.decoder_start_token_id
        self._forced, self._ends, self._pad = merged.forced_bos_token_id, merged.eos_ids, merged.pad_token_id
        self._unknown: int | None = manifest.frontend.get("unk_token_id")
        self._speaks = manifest.frontend["type"] == "audio"

    def of_text(self, text: str) -> Ids | None:
        """int64 [L]; None where this model's tokenizer cannot write the text: it says unknown and nothing else."""
        if self._decoder is None:
            return None
        # Speech models of this kind write a space before every word, the first one too, and so do their tokenizers.
        ids = self._decoder.written(" " + text.strip() if self._speaks else text)
        if self._unknown is not None:  # pieces of the tokenizer's that the model has no embedding for
            ids = [self._unknown if token >= self._vocabulary else token for token in ids]
        if not self._decoder.decode(ids).strip() or max(ids) >= self._vocabulary:
            return None
        if ids[0] == self._starts and self._forced != self._starts:
            ids = ids[1:]
        if self._forced is not None and ids[0] != self._forced:
            ids = [self._forced, *ids]
        if self._ends and ids[-1] not in self._ends:
            ids = [*ids, self._ends[0]]
        return np.asarray(ids, np.int64)

    def of_ids(self, labels: Any) -> Ids | None:
        """int64 [L] of labels that were given, without what pads them; None where nothing is left.

        Raises:
            InputError: no integers, not one row of them, or some that the model does not know.
        """
        row = np.asarray(labels)
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise InputError(f"labels: expected integers [L] of each sample, found {row.dtype} {list(row.shape)}")
        last = np.flatnonzero((row != IGNORED) & (row != self._pad))
        kept = row[: last[-1] + 1 if len(last) else 0].astype(np.int64)
        if self._pad in self._ends and len(kept) < len(row) and row[len(kept)] == self._pad:
            kept = np.append(kept, row[len(kept)]).astype(np.int64)  # the end pads, too
        if kept.size and (kept.min() < 0 or kept.max() >= self._vocabulary):
            found = int(kept.min() if kept.min() < 0 else kept.max())
            raise InputError(
                f"labels: expected ids of 0 to {self._vocabulary - 1}, padded with {IGNORED}, found {found}"
            )
        return kept if kept.size else None

    def fitting(self, labels: Ids, prompt: int) -> Ids:
        """``labels``, cut to what the model has positions for behind a prompt of so many tokens."""
        return labels if self._most is None else labels[: max(0, self._most - prompt + 1)]


def start_of(manifest: Manifest, options: Mapping[str, Any]) -> Ids:
    """int64 [P], the prompt of a decoder that reads an encoder, where the front end gives none.

    Raises:
        InputError: the manifest does not say what it starts from.
    """
    start = GenerationOptions.merge(manifest.generation, options).decoder_start_token_id
    if start is None:
        raise InputError("generation.decoder_start_token_id: expected the id that this model starts from, found none")
    return np.asarray([start], np.int64)
