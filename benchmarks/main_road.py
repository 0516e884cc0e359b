"""The numbers of the main road, in one run: ``python -m txopt.benchmarks.main_road [--out FILE.json]``.

T5-small- and Marian-sized models with random weights, 64 tokens in, 64 out, fp32, against PyTorch eager generate() on the same
weights; then size, memory, start-up times, and what Python costs in a decode step (a one-layer model whose graph costs little).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from txopt.benchmarks.harness import Settings, measure
from txopt.benchmarks.machine import machine

SETTINGS = Settings(batches=(1, 8), source_length=64, new_tokens=64, repeats=5)


def build(name: str, directory: Path) -> Path:
    """A checkpoint of the published sizes with seeded random weights."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    if name == "t5-small":
        model: Any = t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0))
    elif name == "marian":
        model = t.MarianMTModel(
            t.MarianConfig(
                vocab_size=32000,
                d_model=512,
                encoder_layers=6,
                decoder_layers=6,
                encoder_attention_heads=8,
                decoder_attention_heads=8,
                encoder_ffn_dim=2048,
                decoder_ffn_dim=2048,
                max_position_embeddings=512,
                pad_token_id=31999,
                eos_token_id=0,
                decoder_start_token_id=31999,
                scale_embedding=True,
            )
        )
    else:  # "one-layer": so small that a step is mostly what surrounds the engine
        sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        heads: dict[str, Any] = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
        inner: dict[str, Any] = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        model = t.BartForConditionalGeneration(t.BartConfig(**sizes, **heads, **inner, max_position_embeddings=512))
    model.save_pretrained(directory)
    return directory


def against_torch(name: str, work: Path) -> dict[str, Any]:
    from txopt.exporter.pipeline import export

    source = build(name, work / name)
    start = time.perf_counter()
    artifact = export(source, work / f"{name}-out")
    seconds = time.perf_counter() - start
    document, _ = measure(artifact.path, SETTINGS, peer="torch", source=str(source), note=_note)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    size = sum(entry.size for entry in artifact.manifest.files.values())
    limit = 1.4 * weights / 2**20 + 120
    return {
        **document,
        "artifact": name,
        "export_s": round(seconds, 1),
        "weights_mb": round(weights / 1e6, 2),
        "size_over_weights": round(size / weights, 4),
        "peak_mb_allowed": round(limit, 1),
    }


def python_share(work: Path) -> dict[str, float]:
    """Microseconds of a greedy decode step at batch 1 that are not the engine's own run."""
    from txopt.exporter.pipeline import export
    from txopt.runtime.backends import ort
    from txopt.runtime.model import load

    artifact = export(build("one-layer", work / "one-layer"), work / "one-layer-out")
    model = load(artifact.path, threads=1)
    inside = 0.0
    run = ort.Call.run

    def timed(call: Any) -> None:
        nonlocal inside
        start = time.perf_counter()
        run(call)
        inside += time.perf_counter() - start

    import numpy as np

    inputs = {"input_ids": np.full((1, 4), 5, np.int64)}
    options = {
        "max_new_tokens": 400,
        "min_new_tokens": 400,
        "num_beams": 1,
        "eos_token_id": 63,
        "forced_eos_token_id": 63,
    }
    shares = []
    ort.Call.run = timed  # type: ignore[method-assign, assignment]
    try:
        for _ in range(7):
            inside, start = 0.0, time.perf_counter()
            steps = model.generate(**inputs, **options).sequences.shape[1] - 1
            shares.append((time.perf_counter() - start - inside) / steps * 1e6)
    finally:
        ort.Call.run = run  # type: ignore[method-assign]
    return {"steps": steps, "median_us": round(sorted(shares)[len(shares) // 2], 1), "least_us": round(min(shares), 1)}


def start_up(work: Path) -> dict[str, float]:
    """Seconds, best of five processes: importing txopt, and ``txopt run`` of one word on the g2p artifact."""
    from txopt.exporter.pipeline import export

    out = export("txopt.examples.g2p.model:factory", work / "g2p").path
    command = [sys.executable, "-m", "txopt.cli", "run", str(out), "--text", "hello"]
    nothing, importing = [sys.executable, "-c", "pass"], [sys.executable, "-c", "import txopt"]
    seconds = {
        name: _best(arguments) for name, arguments in (("python", nothing), ("import", importing), ("run", command))
    }
    return {
        "import_txopt_s": round(seconds["import"] - seconds["python"], 3),
        "txopt_run_g2p_s": round(seconds["run"], 3),
    }


def _best(command: list[str]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        result: dict[str, Any] = {"machine": machine(), "start_up": start_up(work), "python_share": python_share(work)}
        result["models"] = [against_torch(name, work) for name in ("t5-small", "marian")]
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
