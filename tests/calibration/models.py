"""Models that need no graph: a manifest and tokenizer files, which is all that calibration data is prepared with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from tests.runtime.artifacts import manifest, tensor
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.model import Model

VOCABULARY = 2048


def model(
    directory: Path,
    frontend: dict[str, Any],
    *,
    kind: str = "encoder-decoder",
    inputs: Any = None,
    vocabulary: int = VOCABULARY,
    **generation: Any,
) -> Model:
    """An encoder-decoder, or one half of it (``kind``), of 64 positions."""
    described = manifest()
    encoder, decoder = described.graphs["encoder"], described.graphs["decoder"]
    encoder = GraphSpec(file=encoder.file, inputs=inputs or encoder.inputs, outputs=encoder.outputs)
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
