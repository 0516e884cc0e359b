"""How fast a candidate is beside the fp32 artifact: both in turn, on the same few samples, so many tokens and no more.

Rounded weights say other things, so lengths are forced: what is compared is the same work. Encoders alone answer the same samples
several times over. Owns the measurement; what a difference is worth is search.py's.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from txopt.calibration.batches import Batch, batches
from txopt.calibration.evaluate import BATCH, Said
from txopt.calibration.samples import Samples
from txopt.runtime.frontend import kind_of
from txopt.runtime.model import Model

MOST = 8  # samples
TIMES = 8  # that an encoder alone is run in a round, which would be over too soon to be timed
ROUNDS = 7  # the least and the most of so many hold their median with 98 % (1 - 2 / 2**7), whatever the noise is


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times as fast as the fp32 artifact: the median of the rounds, and the least and the most of them."""

    median: float
    low: float
    high: float


def speed(baseline: Model, candidate: Model, samples: Samples, said: Said | None) -> Speed:
    """How many times as fast ``candidate`` generates what ``baseline`` took so many tokens for; the first MOST samples serve.

    Args:
        said: what ``baseline`` said to the samples; None of an encoder alone.
    """
    few = samples.part(0, min(MOST, len(samples)))
    asked = list(batches(few, min(MOST, BATCH[kind_of(baseline.manifest.frontend)])))
    lengths = None if said is None else [_tokens(batch, said) for batch in asked]
    before, after = (
        partial(_encode, model, asked)
        if lengths is None
        else partial(_generate, model, asked, lengths, samples.options)
        for model in (baseline, candidate)
    )
    before(), after()  # warm
    ratios = []
    for number in range(ROUNDS):
        # Who comes second finds other caches: they take turns in that too.
        pair = (before, after) if number % 2 else (after, before)
        seconds = {each: _timed(each) for each in pair}
        ratios.append(seconds[before] / seconds[after])
    return Speed(median=statistics.median(ratios), low=min(ratios), high=max(ratios))


def _tokens(batch: Batch, said: Said) -> int:
    """How many every row of ``batch`` gets; of a decoder alone, whose prompts count too, as many as all had room for."""
    lengths = [len(said.ids[index]) for index in batch.indices]
    return max(1, max(lengths) if batch.prompt.shape[1] else min(lengths))


def _encode(model: Model, asked: list[Batch]) -> None:
    for _ in range(TIMES):
        for batch in asked:
            model.encode(**batch.feeds)


def _generate(model: Model, asked: list[Batch], lengths: list[int], options: dict[str, Any]) -> None:
    for batch, tokens in zip(asked, lengths, strict=True):
        start = {"decoder_input_ids": batch.prompt} if batch.prompt.shape[1] else {}
        model.generate(**batch.feeds, **start, **{**options, "max_new_tokens": tokens, "min_new_tokens": tokens})


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
