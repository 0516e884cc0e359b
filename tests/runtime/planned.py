"""Artifacts with engines of the fake TensorRT: the artifact's own graphs, described as a build would, and what to feed them."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.fake_tensorrt import plan_bytes
from txopt.runtime.artifact import Artifact
from txopt.runtime.engines import FILE, EngineSet, Lengths, Plan, Profile, to_bytes
from txopt.runtime.graphs import FLOATS, GraphSpec, TensorSpec
from txopt.runtime.model import Model, load
from txopt.runtime.writer import ArtifactWriter

Planned = Callable[..., Artifact]

IDS = np.array([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0], [4, 2, 0, 0, 0]])
SOURCE: dict[str, Any] = {"input_ids": IDS, "attention_mask": (IDS != 0).astype(np.int64)}

VERSION = "1.7.1"
MOST = 10  # tokens that the decoder ranks
LENGTHS: Mapping[str, Lengths] = {"B": (1, 1, 8), "R": (1, 4, 32), "T": (1, 16, 60), "Q": (1, 4, 16)}


def planned(
    artifact: Artifact,
    out: Path,
    *,
    cache_length: int = 64,
    dtype: str | None = None,
    found_too: bool = True,
    aliases: bool = True,
    computes: bool = True,
    ranges: Mapping[str, Lengths] | None = None,
    **facts: object,
) -> Artifact:
    """``artifact`` with one set of engines, as a new one.

    Args:
        dtype: of floats at the engines' borders but logits, and what the new artifact says to be in; None: the graphs' own.
        found_too: the decoder looks for likely tokens itself.
        ranges: of lengths, otherwise than LENGTHS.
        facts: what the set says otherwise.
    """
    if dtype is not None:
        precision = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
        artifact = replace(artifact, manifest=replace(artifact.manifest, precision=precision))
    plans, contents = {}, {}
    for name, graph in artifact.manifest.graphs.items():
        plan = _plan(name, graph, cache_length, dtype, found_too, {**LENGTHS, **(ranges or {})})
        plans[name] = plan
        onnx = str(artifact.file(graph.file).resolve()) if computes else None
        contents[plan.file] = plan_bytes(plan, onnx=onnx, version=VERSION, aliases=aliases)
    one = EngineSet(
        runtime="tensorrt-rtx",
        version=VERSION,
        any_version=False,
        capabilities=("SM89",),
        any_hardware=False,
        precision=artifact.manifest.precision,
        cache_length=cache_length if "decoder" in plans else None,
        plans=plans,
    )
    return with_sets(artifact, out, (replace(one, **facts),), contents)  # type: ignore[arg-type]


def open_both(artifact: Artifact) -> tuple[Model, Model]:
    """On the CPU, and on the fake."""
    return load(artifact.path, threads=1), load(artifact.path, device="tensorrt")


def with_sets(artifact: Artifact, out: Path, sets: tuple[EngineSet, ...], contents: Mapping[str, bytes]) -> Artifact:
    with ArtifactWriter(out) as writer:
        for name in artifact.manifest.files:
            (writer.directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact.path / name, writer.directory / name)
        (writer.directory / "engines").mkdir(exist_ok=True)
        for name, content in contents.items():
            (writer.directory / name).write_bytes(content)
        (writer.directory / FILE).write_bytes(to_bytes(sets))
        return writer.commit(artifact.manifest)


def _plan(
    name: str,
    graph: GraphSpec,
    cache_length: int,
    dtype: str | None,
    found_too: bool,
    lengths: Mapping[str, Lengths],
) -> Plan:
    def fixed(item: TensorSpec) -> TensorSpec:
        kind = dtype if dtype and item.dtype in FLOATS and item.name != "logits" else item.dtype
        axes = tuple(cache_length if axis == "S" else axis for axis in item.axes)
        return TensorSpec(name=item.name, dtype=kind, axes=axes)

    inputs, outputs = (tuple(map(fixed, items)) for items in (graph.inputs, graph.outputs))
    if name == "decoder" and found_too:
        vocabulary = int(next(item for item in graph.outputs if item.name == "logits").axes[-1])
        outputs = (
            *outputs,
            TensorSpec(name="next", dtype="int64", axes=("R",)),
            TensorSpec(name="top_values", dtype="float32", axes=("R", min(MOST, vocabulary))),
            TensorSpec(name="top_ids", dtype="int64", axes=("R", min(MOST, vocabulary))),
            TensorSpec(name="log_sum", dtype="float32", axes=("R",)),
        )
    varying = {axis for item in (*inputs, *outputs) for axis in item.axes if isinstance(axis, str)}
    ranges = {axis: lengths[axis] for axis in varying}
    profiles = [Profile(name="encode", axes=ranges)]
    if name == "decoder":
        step = ranges | {"Q": (1, 1, 1)}
        profiles = [Profile(name="prefill", axes=ranges), Profile(name="step", axes=step)]
    return Plan(file=f"engines/{name}.plan", inputs=inputs, outputs=outputs, profiles=tuple(profiles))
