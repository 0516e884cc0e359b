"""What an opened artifact says to a reference case: every tensor that is compared, by name.

Owns how a case is fed: the encoder once, then the decoder along the case's schedule. It judges nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.cases import Case, Lengths, log_sum_exp, source_axis
from txopt.runtime.graphs import frame_masks, source_masks
from txopt.runtime.model import Model

Array = NDArray[Any]


def counts(model: Model, case: Case, got: Mapping[str, Array], name: str) -> list[int]:
    """How many places of each row of a source-long tensor are no padding; empty where a tensor is no encoder's."""
    graphs, where = model.manifest.graphs, source_axis(name)
    axes = next((out.axes for out in graphs["encoder"].outputs if out.name == name), ()) if "encoder" in graphs else ()
    if where >= len(axes):
        return []
    lengths = Lengths({**case.inputs, **got}, source_masks(graphs) | frame_masks(graphs))
    return lengths.seen(axes[where], got[name].shape[where])


def answers(model: Model, case: Case) -> dict[str, Array]:
    """Everything the artifact says to a case, by tensor name."""
    session = model.session
    if model.manifest.kind == "decoder":
        encoded, got = None, {}
    else:
        encoded = session.encode(case.inputs)
        got = {name: session.array(value) for name, value in encoded.values.items()}
    if model.manifest.kind == "encoder":
        if "logits" in got and got["logits"].ndim == 3:
            seen = counts(model, case, got, "logits")
            got["logits"] = got["logits"].copy()
            for row, count in zip(got["logits"], seen, strict=True):
                row[count:] = 0
        return got
    decoder = session.decoder(encoded, batch=len(case.tokens))
    logits, start = [], 0
    for queries in case.schedule:
        logits.append(decoder.feed(case.tokens[:, start : start + queries]))
        start += queries
    got["logits"] = np.concatenate(logits, axis=1)
    got["log_sum_exp"] = log_sum_exp(got["logits"])
    got |= {name: decoder.cached(name) for name in decoder.names}
    return got


def found(model: Model, case: Case) -> dict[str, tuple[Array, Array]]:
    """What a decoder's graph finds in its own logits after two tokens of the case, and what is in them; searches read the former.

    ``next`` [B] is told by its logit, ``ranked`` [B,2K] by log probabilities: those that the graph gives, and those of its tokens.
    """
    session = model.session
    if model.manifest.kind == "encoder" or not case.tokens.size:
        return {}
    encoded = None if model.manifest.kind == "decoder" else session.encode(case.inputs)
    decoder = session.decoder(encoded, batch=len(case.tokens))
    if not (decoder.most_ranked or decoder.chooses) or (decoder.max_length or 4) < 3:
        return {}
    first, second = case.tokens[:, 0], case.tokens[:, min(1, case.tokens.shape[1] - 1)]
    decoder.prefill(first[:, None])
    told: dict[str, tuple[Array, Array]] = {}
    if decoder.chooses:
        chosen = decoder.advance(second).copy()
        logits = decoder.scores().astype(np.float64)
        told["next"] = np.take_along_axis(logits, chosen[:, None], 1)[:, 0], logits.max(1)
    if decoder.most_ranked:
        scores, tokens = decoder.rank(second)
        logits = decoder.scores().astype(np.float64)
        probable = logits - log_sum_exp(logits)[:, None]
        best = -np.sort(-probable, axis=1)[:, : scores.shape[1]]
        told["ranked"] = np.hstack([scores, np.take_along_axis(probable, tokens, 1)]), np.hstack([best, best])
    return told
