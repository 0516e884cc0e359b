"""What a derived cache is worth: ``python -m txopt.benchmarks.incremental [--out FILE.json]``.

An nn.Transformer of 512 by 6+6 layers with random weights whose decode() takes all tokens at once (examples/cacheless.py): 128
tokens from the exported artifact against PyTorch running the full sequence again for each, batch 1 and 8, fp32, the same ids,
in turn.
"""

import argparse
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.benchmarks.timing import in_turn, ratio

SOURCE_LENGTH, NEW_TOKENS, REPEATS = 64, 128, 3


def full_sequence(module: Any, source: NDArray[np.int64]) -> NDArray[np.int64]:
    """Greedy ids, everything run again for every token."""
    import torch

    ids, mask = torch.full((len(source), 1), 1), torch.ones(source.shape, dtype=torch.int64)
    with torch.no_grad():
        memory = module.encode(torch.from_numpy(source), mask)
        for _ in range(NEW_TOKENS):
            logits = module.decode(ids, memory, mask)[:, -1]
            logits[:, 2] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return np.asarray(ids.numpy())


def measure(work: Path) -> dict[str, Any]:
    from txopt.exporter.pipeline import export
    from txopt.runtime.model import load

    module = import_module("txopt.examples.cacheless").factory()
    model = load(export(module, work / "out").path)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 1}
    results = {}
    for batch in (1, 8):
        source = np.random.default_rng(0).integers(3, 8000, (batch, SOURCE_LENGTH))
        equal = np.array_equal(model.generate(input_ids=source, **options).sequences, full_sequence(module, source))
        if not equal:
            raise SystemExit(f"batch {batch}: other ids; a time would mean nothing")
        calls = {
            "txopt": lambda source=source: model.generate(input_ids=source, **options),
            "full sequence": lambda source=source: full_sequence(module, source),
        }
        times = in_turn(calls, repeats=REPEATS, warmup=0)
        speed = ratio(times["txopt"], times["full sequence"])
        results[f"batch {batch}"] = {**{name: value.to_json() for name, value in times.items()}, "ratio": speed}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(measure(Path(folder)), indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
