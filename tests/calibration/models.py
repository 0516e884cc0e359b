"""Models that need no graph: a manifest and tokenizer files, which is all that calibration data is prepared with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tests.runtime.artifacts import manifest, tensor
from txopt.calibration.batches import Batch
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.model import Model

VOCABULARY = 2048
RATE = 16_000
LOGITS = (tensor("logits", "float32", "B", 3),)
TOKEN_LOGITS = (tensor("logits", "float32", "B", "T", 3),)
EMBEDDING = (tensor("memory", "float32", "B", "T", 8), tensor("embedding", "float32", "B", 8))
WAVEFORM = {"type": "waveform", "sampling_rate": RATE, "padding_value": 0.0, "least_samples": 400, "most_samples": RATE}
SOUND_INPUTS = (tensor("input_values", "float32", "B", "N"), tensor("attention_mask", "int64", "B", "N"))
IMAGE = {"type": "image", "do_resize": True, "size": {"height": 8, "width": 8}}
IMAGE_INPUTS = (tensor("pixel_values", "float32", "B", 3, 8, 8),)


def model(
    directory: Path,
    frontend: dict[str, Any],
    *,
    kind: str = "encoder-decoder",
    inputs: Any = None,
    outputs: Any = None,
    vocabulary: int = VOCABULARY,
    **generation: Any,
) -> Model:
    """An encoder-decoder, or one half of it (``kind``), of 64 positions."""
    described = manifest()
    encoder, decoder = described.graphs["encoder"], described.graphs["decoder"]
    encoder = GraphSpec(file=encoder.file, inputs=inputs or encoder.inputs, outputs=outputs or encoder.outputs)
    logits = tensor("logits", "float32", "R", "Q", vocabulary)
    decoder = GraphSpec(file=decoder.file, inputs=decoder.inputs, outputs=(logits, *decoder.outputs[1:]))
    halves = {"encoder": encoder, "decoder": decoder}
    changed = replace(
        described,
        kind=kind,
        frontend={"source_vocabulary": vocabulary, **frontend},
        generation={"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, **generation},
        graphs={name: graph for name, graph in halves.items() if name in kind},
        cache=described.cache if "decoder" in kind else None,
    )
    return cast(Model, SimpleNamespace(manifest=changed, artifact=SimpleNamespace(path=directory)))


def decoder_ids(batch: Batch) -> NDArray[np.int64]:
    """int64 [B,P+L-1], what teacher forcing feeds: the prompt, and the labels without the last; any id where these are padding."""
    assert batch.labels is not None
    return np.concatenate([batch.prompt, np.maximum(batch.labels[:, :-1], 0)], axis=1)
