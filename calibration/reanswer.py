"""Reference cases asked anew: the same questions, answered by another artifact of the same model.

A quantized artifact computes with other weights than PyTorch had. What its engine must reproduce is what those weights say in
float32, so its reference is the float artifact with the rounded weights in it. How far rounding took them from PyTorch is not
parity's question but the loss gate's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.answers import answers, counts
from txopt.runtime.cases import Case, sample
from txopt.runtime.model import Model

Array = NDArray[Any]


def reanswer(model: Model, cases: Sequence[Case]) -> list[Case]:
    """``cases`` with the answers of ``model``: every tensor, and the ids, margins and scores of its searches."""
    return [_reanswered(model, case) for case in cases]


def _reanswered(model: Model, case: Case) -> Case:
    got = answers(model, case)
    kept = (name for name in case.expected if name != "log_sum_exp")
    expected = {name: sample(name, got[name], counts(model, case, got, name)) for name in kept}
    if "log_sum_exp" in case.expected:
        expected["log_sum_exp"] = got["log_sum_exp"]
    searched = {search: _searched(model, case, search) for search in case.generated}
    greedy, beam = searched.get("greedy"), searched.get("beam")
    return replace(
        case,
        expected=expected,
        generated={search: result.sequences for search, result in searched.items()},
        margins=None if greedy is None else _margins(model, case, greedy.sequences),
        scores=None if beam is None else beam.scores,
    )


def _searched(model: Model, case: Case, search: str) -> Any:
    start = {} if model.manifest.kind == "decoder" else {"decoder_input_ids": case.generated[search][:, :1]}
    return model.generate(**case.inputs, **start, **case.options[search])


def _margins(model: Model, case: Case, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """How far the best logit is ahead of the second at every token of ``ids`` [B,L] but the first, float32 [B,L-1]."""
    if model.manifest.kind == "decoder":
        prompt = case.inputs["attention_mask"]
        mask = np.concatenate([prompt, np.ones((len(ids), ids.shape[1] - prompt.shape[1]), np.int64)], axis=1)
        rows = [_row_margins(model, row[seen != 0]) for row, seen in zip(ids, mask, strict=True)]
        width = ids.shape[1] - 1
        return np.stack([np.concatenate([np.full(width - len(row), np.inf, np.float32), row]) for row in rows])
    decoder = model.session.decoder(model.session.encode(case.inputs))
    return _ahead(decoder.feed(ids)[:, :-1])


def _row_margins(model: Model, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Of one unpadded row of a decoder alone."""
    first: NDArray[np.float32] = _ahead(model.session.decoder(None).feed(tokens[None])[:, :-1])[0]
    return first


def _ahead(logits: Array) -> NDArray[np.float32]:
    top = np.partition(logits, -2, axis=-1)[..., -2:]
    return np.ascontiguousarray(top[..., 1] - top[..., 0], np.float32)
