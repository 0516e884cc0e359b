"""What a decoding loop asks of a decoder, and what it gives back.

Owns the interfaces that the loops share; it knows neither the loops nor who decodes.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

THIS_MODEL = "this model"  # what bounds a decoder's rows, where it is not what runs it

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Decoder(Protocol):
    """R rows that advance together, one token at a time.

    ``max_length`` is the most positions a row may have, prompt included; None means no bound.
    """

    max_length: int | None

    def prefill(self, ids: Ids, mask: Ids | None) -> Floats:
        """Feeds prompts int64 [R,P], padded on the left where ``mask`` int64 [R,P] is 0 (None: no padding).

        Returns:
            Logits float32 [R,V] after each row's last token, the caller's to write to.
        """
        ...

    def step(self, ids: Ids) -> Floats:
        """Feeds one token per row, int64 [R]; logits float32 [R,V], the caller's to write to until the next call overwrites them."""
        ...

    def reorder(self, rows: Ids) -> None:
        """Lets row i go on as what row ``rows[i]`` (int64 [R]) was."""
        ...


@runtime_checkable
class GreedyDecoder(Decoder, Protocol):
    """A decoder that can leave its scores where they are, and says only which token is the likeliest."""

    def advance(self, ids: Ids) -> Ids:
        """Feeds one token per row, int64 [R]; each row's likeliest next token, int64 [R], the caller's until the next call."""
        ...

    def scores(self) -> Floats:
        """The logits float32 [R,V] that the last call left."""
        ...


@runtime_checkable
class RankingDecoder(Decoder, Protocol):
    """A decoder that can leave its scores where they are, and says only which tokens are the likeliest.

    ``most_ranked`` is how many of each row it can say; 0 means none.
    """

    most_ranked: int

    def rank(self, ids: Ids) -> tuple[Floats, Ids]:
        """Feeds one token per row, int64 [R]; the likeliest next tokens' log probabilities float32 [R,most_ranked], falling, and ids.

        Where a row's scores are NaN or infinite, so are these.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What generate() found; N is the number of sources times ``num_return_sequences``.

    Attributes:
        sequences: int64 [N,L], the decoder's prompt included, padded after the end of sequence.
        scores: float32 [N] of beam search: sum of log probabilities over (generated length ** length_penalty); None
            without beams.
        beam_indices: int32 [N,L-P], the row (source times num_beams plus beam) that each generated token continued; -1
            after the end; None without beams.
    """

    sequences: Ids
    scores: Floats | None = None
    beam_indices: NDArray[np.int32] | None = None
