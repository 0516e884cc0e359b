"""The road from an artifact to one with TensorRT engines, stage by stage: nothing changes at OUT unless every plan is built.

Owns the order of the stages, what is written, and what a build says of itself. Graphs are lowered by lowering/tensorrt.py, sizes
chosen by profiles.py, plans built by engine.py. An artifact's graphs, weights and cases stay as they are: plans are added to its
files, and the manifest binds them by their hashes.
"""

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt.exporter import weights
from txopt.exporter.engine import MANNERS, WRONG_OPTIONS, Built, Engine, Switches
from txopt.exporter.lowering import tensorrt
from txopt.exporter.lowering.choice import described
from txopt.exporter.plan_cache import PlanCache, check_place, key_of
from txopt.exporter.profiles import Sizes, profiles_of
from txopt.runtime.artifact import Artifact
from txopt.runtime.converters import Converter, convert_fields, integer, several
from txopt.runtime.engines import FILE, GPU, LIBRARIES, EngineSet, Plan, Profile, engines_of, to_bytes
from txopt.runtime.errors import ArtifactError, MissingDependencyError, UsageError, explain
from txopt.runtime.files import FOLDER
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.manifest import Manifest
from txopt.runtime.writer import ArtifactWriter

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

STAGES = ("open", "lower", "build", "write")
RUNTIME = "tensorrt-rtx"
# TensorRT tunes kernels for one row where a profile asks for it. TensorRT-RTX makes them for the lengths at hand where a plan runs.
TUNED = ("tensorrt",)
_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}

Report = Callable[..., None]  # (stage), and (stage, done, total) while it lasts


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is built, and for whom.

    Attributes:
        runtime: the library, "tensorrt" or "tensorrt-rtx".
        capabilities: GPUs, such as "SM89"; with "tensorrt" none: it builds for the one at hand.
        batch, beams, source, prompt, cache: see profiles.Sizes; None: what suits the model.
        switches: see engine.Switches.
        kept: the directory of plans and timings that earlier builds left; None: none.

    Raises:
        UsageError: values of other kinds, all of them listed. Whether sizes are the model's is said once it is known.
    """

    runtime: str = RUNTIME
    capabilities: tuple[str, ...] = ()
    batch: int | None = None
    beams: int | None = None
    source: int | None = None
    prompt: int | None = None
    cache: int | None = None
    switches: Switches = field(default_factory=Switches)
    kept: Path | None = None

    def __post_init__(self) -> None:
        convert_fields(self, _CONVERTERS, WRONG_OPTIONS)

    def sizes(self, manifest: Manifest) -> Sizes:
        """Raises UsageError where one is not the model's."""
        return Sizes.of(manifest, **{name: getattr(self, name) for name in _SIZES})


def _runtime(value: Any) -> str:
    if not isinstance(value, str) or value not in LIBRARIES:
        raise ValueError(f"one of {', '.join(LIBRARIES)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _gpus(value: Any) -> tuple[str, ...]:
    expected = 'a list of names such as ("SM89",)'
    if isinstance(value, str):  # which would be a list of letters
        raise ValueError(expected)
    return several(_text, expected)(value)


def _switches(value: Any) -> Switches:
    if not isinstance(value, Switches):
        raise ValueError("Switches(...)")
    return value


def _directory(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("a directory's path")
    return Path(value)


_SIZES = ("batch", "beams", "source", "prompt", "cache")
_CONVERTERS: Mapping[str, Converter] = {
    "runtime": _runtime,
    "capabilities": _gpus,
    **dict.fromkeys(_SIZES, integer()),
    "switches": _switches,
    "kept": _directory,
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One plan before it is built: what the engine will take and give, and the nodes of its lowered graph by operator."""

    plan: Plan
    model: ir.Model
    nodes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Made:
    """An artifact with engines; and of each build, by graph, its layers, casts, bytes and seconds, and whether it was kept before."""

    artifact: Artifact
    engines: EngineSet
    builds: Mapping[str, Mapping[str, Any]]


def plan(
    artifact: str | os.PathLike[str],
    options: Options,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What ``build`` would build, as a JSON document; nothing is built, and nothing stays written.

    No library is needed; where TensorRT-RTX is there, it is asked whether it builds for these GPUs.

    Raises:
        ArtifactError, UsageError: as ``build``.
    """
    options = replace(options, capabilities=tuple(dict.fromkeys(options.capabilities)))
    if not MANNERS[options.runtime].needs_gpu:
        with suppress(MissingDependencyError):
            Engine(options.runtime, options.capabilities, options.switches)
    if odd := [name for name in options.capabilities if not GPU.fullmatch(name)]:
        raise UsageError(f"capability: expected GPUs such as SM90, got {', '.join(map(ascii, odd))}")
    opened = Artifact.open(artifact)
    if options.kept is not None:
        check_place(options.kept)
    if out is not None:
        with ArtifactWriter(out, overwrite=overwrite):
            pass  # it may be written
    sizes = options.sizes(opened.manifest)
    drafts = _drafts(opened, sizes, options)
    return {
        "artifact": str(artifact),
        "runtime": options.runtime,
        "capabilities": list(options.capabilities),
        "precision": opened.manifest.precision,
        "sizes": sizes.to_json(),
        "options": asdict(options.switches),
        "plans": {name: {**draft.plan.to_json(), "nodes": dict(draft.nodes)} for name, draft in drafts.items()},
    }


def build(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    progress: Report | None = None,
) -> Made:
    """Builds the engines of ``options`` and adds them to the artifact, or to a copy of it at ``out``.

    Engines for the same library and GPUs are replaced; others stay. No GPU and no driver are needed with "tensorrt-rtx".

    Args:
        out: None: the artifact itself is replaced, by renaming, once everything is built.
        overwrite: replace an artifact that is at ``out``.
        progress: called with the name of each of STAGES as it begins, and with (stage, done, total) while plans are built.

    Raises:
        ArtifactError: the artifact is damaged, or ``out`` may not be written.
        UsageError: an option is wrong, or the library does not take a graph. MissingDependencyError: the library is not there.
    """
    options, report = options or Options(), progress or (lambda *_: None)
    report("open")
    engine = Engine(options.runtime, options.capabilities, options.switches)
    opened = Artifact.open(artifact)
    sizes = options.sizes(opened.manifest)
    target = opened.path if out is None else Path(out)
    with _writing(target), ArtifactWriter(target, overwrite=overwrite or out is None) as writer:
        report("lower")
        drafts = _drafts(opened, sizes, replace(options, capabilities=engine.capabilities))
        with tempfile.TemporaryDirectory(prefix="txopt-") as folder, PlanCache.opened(options.kept) as kept:
            builds: dict[str, Mapping[str, Any]] = {}
            (writer.directory / FOLDER).mkdir()
            for name, draft in drafts.items():
                report("build")
                started = time.perf_counter()
                built, found = _built(name, draft, engine, options, kept, Path(folder), report)
                (writer.directory / draft.plan.file).write_bytes(built.plan)
                builds[name] = {
                    "layers": dict(built.layers),
                    "float_casts": built.float_casts,
                    "attention_apart": built.apart,
                    "bytes": len(built.plan),
                    "seconds": round(time.perf_counter() - started, 2),
                    "kept": found,
                }
        report("write")
        made = EngineSet(
            runtime=options.runtime,
            version=engine.version,
            any_version=options.switches.any_version,
            capabilities=engine.capabilities,
            any_hardware=options.switches.any_hardware,
            precision=opened.manifest.precision,
            cache_length=None if opened.manifest.cache is None else sizes.cache,
            plans={name: draft.plan for name, draft in drafts.items()},
        )
        others = tuple(one for one in _engines_of(opened) if _key(one) != _key(made))
        _bring(opened, writer, others, linked=out is None)
        (writer.directory / FILE).write_bytes(to_bytes((*others, made)))
        _check_unchanged(opened, writer, {plan.file for plan in made.plans.values()})
        committed = writer.commit(replace(opened.manifest, files={}))
    return Made(artifact=committed, engines=made, builds=builds)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Raises ArtifactError where there is no room for what is written."""
    try:
        yield
    except OSError as err:
        if err.errno not in _NO_ROOM:
            raise
        raise ArtifactError(
            f"{target}: engines cannot be written: {err.strerror or err}; they take room there and in {tempfile.gettempdir()}"
        ) from err


def _drafts(artifact: Artifact, sizes: Sizes, options: Options) -> dict[str, Draft]:
    manifest, drafts = artifact.manifest, dict[str, Draft]()
    for name, graph in manifest.graphs.items():
        length = sizes.cache if name == "decoder" else None
        model = tensorrt.lower(ir.load(artifact.file(graph.file)), cache_length=length)
        spec = _lowered(graph, model, length)
        profiles = profiles_of(graph, sizes, manifest, alone=options.runtime in TUNED)
        file = f"{FOLDER}/{'-'.join((options.runtime, *options.capabilities, name))}.plan"
        counted = {
            operator: sum(node.op_type == operator for node in model.graph)
            for operator in sorted({node.op_type for node in model.graph})
        }
        drafts[name] = Draft(
            plan=Plan(file=file, inputs=spec.inputs, outputs=spec.outputs, profiles=profiles),
            model=model,
            nodes=counted,
        )
    return drafts


def _lowered(graph: GraphSpec, model: ir.Model, length: int | None) -> GraphSpec:
    """What the manifest says of ``graph``, as its lowered ``model`` has it."""
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    graph = described(graph, model)
    unread = {output.name for output in model.graph.outputs if str(output.name).startswith(tensorrt.UNREAD)}
    added = tuple(
        replace(item, name=tensorrt.UNREAD + item.name)
        for item in graph.inputs
        if tensorrt.UNREAD + item.name in unread
    )
    inputs, outputs = (
        tuple(
            replace(
                item,
                dtype=_TYPES[types[item.name]],  # type: ignore[index]
                axes=tuple(length if axis == "S" and length is not None else axis for axis in item.axes),
            )
            for item in items
        )
        for items in (graph.inputs, (*graph.outputs, *added))
    )
    return GraphSpec(file=graph.file, inputs=inputs, outputs=outputs)


def _built(
    name: str, draft: Draft, engine: Engine, options: Options, kept: PlanCache, folder: Path, report: Report
) -> tuple[Built, bool]:
    """The plan of ``draft``, and whether it was kept from before."""
    written = folder / name
    written.mkdir()
    weights.write({name: draft.model}, written)
    library = "-".join((options.runtime, engine.version, *engine.capabilities))
    facts = {"library": library, "options": asdict(options.switches), "profiles": _axes(draft.plan.profiles)}
    files = {file.name: file for file in written.iterdir()}
    key = key_of(files, facts) if kept.directory is not None else ""
    found = kept.find(key)
    if found is None:
        built, timing = engine.build(
            written / f"{name}.onnx",
            draft.plan.profiles,
            lambda done, total: report("build", done, total),
            timing=kept.timing(library),
        )
        kept.keep(key, built)
        kept.keep_timing(library, timing)
    else:
        built = found
    shutil.rmtree(written)
    return built, found is not None


def _axes(profiles: Sequence[Profile]) -> list[dict[str, list[int]]]:
    return [{axis: list(lengths) for axis, lengths in profile.axes.items()} for profile in profiles]


def _key(one: EngineSet) -> tuple[str, tuple[str, ...]]:
    return one.runtime, tuple(sorted(one.capabilities))


def _bring(artifact: Artifact, writer: ArtifactWriter, others: Sequence[EngineSet], *, linked: bool) -> None:
    """Everything of the artifact but the engines that go, linked where its own directory goes too."""
    kept = {plan.file for one in others for plan in one.plans.values()}
    for name in artifact.manifest.files:
        if name == FILE or (name.startswith(f"{FOLDER}/") and name not in kept):
            continue
        target = writer.directory / name
        if linked:
            with suppress(OSError):  # no links here, or no more of them
                os.link(artifact.file(name), target, follow_symlinks=False)
        if not target.exists():
            shutil.copyfile(artifact.file(name), target, follow_symlinks=False)


def _engines_of(artifact: Artifact) -> tuple[EngineSet, ...]:
    """What was built before; none where this version cannot read it, and then all are replaced."""
    try:
        return engines_of(artifact)
    except ArtifactError as err:
        logger.warning("the artifact's earlier engines cannot be read, and are replaced: %s", err)
        return ()


def _check_unchanged(artifact: Artifact, writer: ArtifactWriter, made: Collection[str]) -> None:
    """That nobody changed the artifact's files while engines were built, for the manifest to be written would vouch for them."""
    staged = writer.staged(replace(artifact.manifest, files={})).manifest.files
    changed = [
        name
        for name, entry in artifact.manifest.files.items()
        if name in staged and name != FILE and name not in made and staged[name] != entry
    ]
    if changed:
        raise ArtifactError(
            explain(
                f"{artifact.path}: these files were changed while engines were built; nothing was written:", changed
            )
        )
