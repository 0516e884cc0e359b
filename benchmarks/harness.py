"""``txopt bench``: one artifact, measured; against a peer where asked, in turn, outputs compared before a time counts."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from txopt.benchmarks.footprint import footprint
from txopt.benchmarks.inputs import draw
from txopt.benchmarks.peers import Peer, Txopt, open_peer
from txopt.benchmarks.timing import Timing, in_turn, ratio
from txopt.runtime.errors import ParityError, UsageError
from txopt.runtime.manifest import QUANTIZED
from txopt.runtime.model import Model, load


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Batch sizes, tokens in and out, timed runs, the device, engine threads (None: one per core)."""

    batches: tuple[int, ...] = (1, 8)
    source_length: int = 64
    new_tokens: int = 64
    repeats: int = 5
    device: str = "cpu"
    threads: int | None = None


def measure(
    path: Path, settings: Settings, *, peer: str | None, source: str | None, note: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """(document, text). Ratios first, then times.

    A quantized artifact is compared with the peer in fp32, and with how many ids are the same: rounded weights may say other things.

    Raises:
        ParityError: the peer generated other ids than a float artifact; then no time is worth anything.
    """
    if min(*settings.batches, settings.source_length, settings.new_tokens, settings.repeats) < 1:
        given = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
        raise UsageError(f"batch sizes, lengths and repeats must be at least 1, got {given}")
    if peer is not None and settings.device != "cpu":
        raise UsageError(
            f"--against {peer} computes on the CPU, and --device {settings.device} does not: leave one out; python -m "
            "txopt.benchmarks.gpu compares on a GPU"
        )
    model = load(path, device=settings.device, threads=settings.threads)
    if model.manifest.kind == "encoder":
        raise UsageError("bench measures generate(); this artifact is an encoder alone")
    precision = "fp32" if model.manifest.precision in QUANTIZED else model.manifest.precision
    other = None if peer is None else open_peer(peer, source, precision, settings.threads)
    rows = []
    for batch in settings.batches:
        note(f"batch {batch}: {settings.repeats} runs of {settings.new_tokens} tokens")
        rows.append(_batch(model, other, batch, settings))
    note("load time and memory, in a process of its own")
    cost = footprint(
        path,
        batch=1,
        source_length=settings.source_length,
        new_tokens=settings.new_tokens,
        device=settings.device,
        threads=settings.threads,
    )
    size = sum(entry.size for entry in model.manifest.files.values())
    document = {
        "artifact": str(path),
        "settings": asdict(settings),
        "batches": rows,
        "size_mb": round(size / 1e6, 2),
        **cost,
    }
    return document, _text(document)


def _batch(model: Model, other: Peer | None, batch: int, settings: Settings) -> dict[str, Any]:
    inputs = draw(model.artifact, batch, settings.source_length)
    peers: list[Peer] = [Txopt(model), *([other] if other is not None else [])]
    answers = {peer.name: peer.generate(inputs, settings.new_tokens) for peer in peers}
    ours = answers["txopt"]
    for name, theirs in answers.items():
        if model.manifest.precision not in QUANTIZED and not np.array_equal(ours, theirs):
            raise ParityError(
                f"{name} generated other ids than txopt at batch {batch}; expected equal ids before any time is compared"
            )
    calls = {peer.name: lambda peer=peer: peer.generate(inputs, settings.new_tokens) for peer in peers}
    times = in_turn(calls, repeats=settings.repeats)
    first, token = _latencies(model, inputs, settings)
    row: dict[str, Any] = {
        "batch": batch,
        "whole": {name: timing.to_json() for name, timing in times.items()},
        "first_token": first.to_json(),
        "per_token": token.to_json(),
        "tokens_per_second": round(batch * settings.new_tokens / times["txopt"].median, 1),
    }
    if other is not None:
        row["ratio"] = {other.name: ratio(times["txopt"], times[other.name])}
        row["same_ids"] = {other.name: round(float(np.mean(ours == answers[other.name])), 4)}
    return row


def _latencies(model: Model, inputs: Any, settings: Settings) -> tuple[Timing, Timing]:
    """Seconds to the first token, and between two later ones."""
    firsts: list[float] = []
    later: list[float] = []
    for _ in range(settings.repeats):
        start = last = time.perf_counter()
        for index, _token in enumerate(
            model.stream(**inputs, max_new_tokens=settings.new_tokens, min_new_tokens=settings.new_tokens, num_beams=1)
        ):
            now = time.perf_counter()
            (firsts if index == 0 else later).append(now - (start if index == 0 else last))
            last = now
    return Timing(seconds=tuple(firsts)), Timing(seconds=tuple(later or firsts))


def _same(share: float) -> str:
    return "same ids" if share == 1 else f"{share:.1%} of ids the same"


def _text(document: dict[str, Any]) -> str:
    lines = []
    for row in document["batches"]:
        for name, value in row.get("ratio", {}).items():
            lines.append(
                f"batch {row['batch']}: {value['median']:.2f}x {name} ({value['least']:.2f} to {value['most']:.2f}), "
                f"{_same(row['same_ids'][name])}"
            )
        for name, value in row["whole"].items():
            lines.append(
                f"  {name}: {value['median_ms']:.1f} ms ({value['fastest_ms']:.1f} to {value['slowest_ms']:.1f}) for the whole"
            )
        lines.append(
            f"  first token {row['first_token']['median_ms']:.1f} ms, then {row['per_token']['median_ms']:.2f} ms each; "
            f"{row['tokens_per_second']:.0f} tokens/s"
        )
    lines.append(
        f"size {document['size_mb']:.1f} MB, load {document['load_s']:.2f} s, "
        f"peak memory {document['peak_mb']:.0f} MB ({document['base_mb']:.0f} MB before loading)"
    )
    return "\n".join(lines)
