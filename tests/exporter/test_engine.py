"""Engines of tiny artifacts, built by TensorRT-RTX on a machine without a GPU: what is built, kept, refused, and left behind."""

import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.calibration.graphs import parsed
from tests.exporter.engine_feeds import FAMILIES
from txopt.benchmarks.engine_graphs import PRECISIONS, graphs
from txopt.cli import main
from txopt.exporter import engine, engines, weights
from txopt.exporter.attempt import twin
from txopt.exporter.engine import Engine, Switches
from txopt.exporter.engines import Options
from txopt.exporter.lowering import ort, tensorrt
from txopt.exporter.plan_cache import PlanCache
from txopt.exporter.profiles import Sizes, profiles_of
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.trt_log import log_of
from txopt.runtime.engines import Profile, engines_of
from txopt.runtime.errors import ArtifactError, MissingDependencyError, UsageError
from txopt.runtime.parity import verify
from txopt.runtime.writer import ArtifactWriter

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra test brings TensorRT-RTX for Linux on x86-64")
pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

SMALL = Options(capabilities=("SM89",), batch=2, beams=2, source=16, prompt=8, cache=24)
FRAMES = replace(SMALL, source=None)  # of sources that are always as long: sound and pictures
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Make = Callable[[str], Artifact]


def small(family: str) -> Options:
    return FRAMES if family in ("whisper", "trocr") else SMALL


def quiet(done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def built(artifacts: Make, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """BART's tiny artifact with engines for SM89; not to be changed."""
    return engines.build(artifacts("bart").path, tmp_path_factory.mktemp("engines") / "bart", SMALL).artifact


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_in_every_precision_with_its_own_layers(
    family: str, precision: str, artifacts: Make, tmp_path: Path
) -> None:
    """No Attention, cache update, norm or pair of Q and DQ is lost, and no float is cast but where the graph says so.

    RMSNormalization is taken apart by the parser; in half precision it casts what comes in and what goes out.
    """
    artifact = artifacts(family)
    builder, sizes = Engine("tensorrt-rtx", ["SM89"], Switches()), small(family).sizes(artifact.manifest)
    for name, model in graphs(artifact, precision).items():
        low = tensorrt.lower(model, cache_length=sizes.cache if name == "decoder" else None)
        nodes = Counter(node.op_type for node in low.graph)
        casts = [node for node in low.graph if node.op_type == "Cast" and _is_float(node)]
        halves = [node for node in low.graph if node.op_type == "RMSNormalization" and precision in ("fp16", "bf16")]
        (tmp_path / name).mkdir()
        weights.write({name: low}, tmp_path / name)
        profiles = profiles_of(artifact.manifest.graphs[name], sizes, artifact.manifest, alone=False)
        made, _ = builder.build(tmp_path / name / f"{name}.onnx", profiles, quiet)
        layers = Counter(made.layers)
        assert layers["ATTENTION_INPUT"] == nodes["Attention"] > 0
        assert layers["KV_CACHE_UPDATE"] == nodes["TensorScatter"] == (4 if name == "decoder" else 0)
        assert layers["NORMALIZATION"] == nodes["LayerNormalization"]
        assert nodes["LayerNormalization"] + nodes["RMSNormalization"] > 3
        assert layers["MATRIX_MULTIPLY"] == nodes["MatMul"]
        assert (layers["QUANTIZE"], layers["DEQUANTIZE"]) == (nodes["QuantizeLinear"], nodes["DequantizeLinear"])
        assert layers["TOPK"] == (2 if name == "decoder" else 0)
        assert made.float_casts == len(casts) + 2 * len(halves)
        assert made.apart == (0 if precision in ("fp16", "bf16") else nodes["Attention"])
        if precision in ("int8", "fp8", "int4") and name == "decoder":
            assert layers["DEQUANTIZE"] > 5


def _is_float(node: ir.Node) -> bool:
    return all(value is not None and value.dtype in _FLOATS for value in (node.inputs[0], node.outputs[0]))


def test_plans_are_files_of_the_artifact_that_still_says_the_same(built: Artifact, artifacts: Make) -> None:
    (one,) = engines_of(Artifact.open(built.path))
    assert (one.runtime, one.capabilities, one.precision, one.cache_length) == ("tensorrt-rtx", ("SM89",), "fp32", 24)
    assert set(one.plans) == {"encoder", "decoder"}
    assert {f"engines/tensorrt-rtx-SM89-{name}.plan" for name in one.plans} < built.manifest.files.keys()
    before, after = artifacts("bart").manifest, replace(built.manifest, files={})
    assert after == replace(before, files={})
    assert verify(built.path).passed


def test_a_decoder_plan_says_what_the_engine_takes_and_gives(built: Artifact) -> None:
    plan = engines_of(built)[0].plans["decoder"]
    inputs, outputs = ({item.name: item for item in items} for items in (plan.inputs, plan.outputs))
    assert str(inputs["self_key.0"]) == "self_key.0 float32 [R,4,24,16]"
    assert [str(outputs[name]) for name in ("next", "top_values", "top_ids", "log_sum")] == [
        "next int64 [R]",
        "top_values float32 [R,100]",
        "top_ids int64 [R,100]",
        "log_sum float32 [R]",
    ]
    step, prefill = plan.profiles
    assert (step.name, prefill.name) == ("step", "prefill")
    assert step.takes({"B": 2, "R": 4, "Q": 1, "T": 16})
    assert not step.takes({"Q": 3})
    assert prefill.takes({"B": 1, "R": 1, "Q": 8, "T": 1})
    assert not prefill.takes({"T": 17})


def test_a_changed_plan_is_refused_before_anything_reads_it(built: Artifact, tmp_path: Path) -> None:
    shutil.copytree(built.path, tmp_path / "copy")
    file = tmp_path / "copy" / engines_of(built)[0].plans["decoder"].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"decoder\.plan.*SHA-256"):
        Artifact.open(tmp_path / "copy")


def test_another_gpu_adds_a_set_and_the_same_one_replaces_it(built: Artifact, tmp_path: Path) -> None:
    """In the artifact's own place; the plans of the first set are those that were there."""
    shutil.copytree(built.path, tmp_path / "artifact")
    several = engines.build(tmp_path / "artifact", None, replace(SMALL, capabilities=("SM80", "SM120"))).artifact
    first, second = engines_of(Artifact.open(tmp_path / "artifact"))
    assert (first.capabilities, second.capabilities) == (("SM89",), ("SM80", "SM120"))
    kept = first.plans["decoder"].file
    assert several.manifest.files[kept] == built.manifest.files[kept]
    engines.build(tmp_path / "artifact", None, replace(SMALL, batch=3))
    found = engines_of(Artifact.open(tmp_path / "artifact"))
    assert [one.capabilities for one in found] == [("SM80", "SM120"), ("SM89",)]
    assert found[1].plans["encoder"].profiles[0].axes["B"] == (1, 3, 3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_build_that_was_done_is_not_done_again(
    artifacts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(FRAMES, kept=tmp_path / "kept")
    first = engines.build(artifacts("whisper").path, tmp_path / "first", asked)
    monkeypatch.setattr(Engine, "build", lambda *_, **__: pytest.fail("it was there"))
    again = engines.build(artifacts("whisper").path, tmp_path / "again", asked)
    assert [build["kept"] for build in (*first.builds.values(), *again.builds.values())] == [False] * 2 + [True] * 2
    assert again.artifact.manifest.files == first.artifact.manifest.files
    with pytest.raises(pytest.fail.Exception, match="it was there"):
        engines.build(artifacts("whisper").path, tmp_path / "other", replace(asked, batch=3))


def test_what_was_kept_and_changed_is_not_taken(tmp_path: Path) -> None:
    made = engine.Built(plan=b"plan", layers={"CAST": 1}, float_casts=0, apart=0)
    with PlanCache.opened(tmp_path / "kept") as kept:
        kept.keep("key", made)
        assert kept.find("key") == made
        (file,) = (tmp_path / "kept").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
        assert kept.find("key") is None
        assert kept.find("another") is None


def test_ctrl_c_during_a_build_leaves_everything_as_it_was(artifacts: Make, tmp_path: Path) -> None:
    shutil.copytree(artifacts("bart").path, tmp_path / "artifact")
    files = sorted((tmp_path / "artifact").iterdir())

    def interrupt(stage: str, done: int = 0, total: int = 0) -> None:
        if stage == "build" and done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind a shell has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            engines.build(tmp_path / "artifact", None, replace(SMALL, kept=tmp_path / "kept"), progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted((tmp_path / "artifact").iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "kept"]
    assert not list((tmp_path / "kept").iterdir())


def test_who_builds_and_who_runs_share_a_logger(artifacts: Make, tmp_path: Path) -> None:
    """The library refuses another while anything lives that was made with the first."""
    library = import_module("tensorrt_rtx_bindings")
    running = library.Builder(log_of(library))  # a Runtime takes one likewise, and needs a driver
    engines.build(artifacts("whisper").path, tmp_path / "out", FRAMES)
    assert engines_of(Artifact.open(tmp_path / "out"))
    assert running.logger is log_of(library)


def test_progress_that_fails_ends_the_build_and_not_the_process(artifacts: Make, tmp_path: Path) -> None:
    def fail(stage: str, done: int = 0, total: int = 0) -> None:
        if done == 5:
            raise BrokenPipeError("nobody reads it")

    with pytest.raises(BrokenPipeError, match="nobody reads it"):
        engines.build(artifacts("whisper").path, tmp_path / "out", FRAMES, progress=fail)
    assert not list(tmp_path.iterdir())


def test_other_graphs_do_not_get_the_engines_of_an_artifact(built: Artifact, tmp_path: Path) -> None:
    """Of a quantized twin, say."""
    twin(built, graphs(built, "fp16"), tmp_path)
    assert not (tmp_path / "engines").exists()


def test_a_build_in_another_thread_does_without_signals(artifacts: Make, tmp_path: Path) -> None:
    made: list[Any] = []
    thread = threading.Thread(
        target=lambda: made.append(engines.build(artifacts("whisper").path, tmp_path / "out", FRAMES))
    )
    artifacts("whisper")
    thread.start()
    thread.join()
    assert len(made) == 1


def test_files_that_change_during_a_build_are_not_vouched_for(
    artifacts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artifacts("bart").path, tmp_path / "artifact")

    def build(*_: Any, **__: Any) -> tuple[engine.Built, None]:
        with (tmp_path / "artifact/weights.data").open("ab") as file:
            file.write(b"more")
        return engine.Built(plan=b"plan", layers={}, float_casts=0, apart=0), None

    monkeypatch.setattr(Engine, "build", build)
    with pytest.raises(ArtifactError, match=r"changed while engines were built(?s:.*)weights\.data"):
        engines.build(tmp_path / "artifact", None, SMALL)
    assert not (tmp_path / "artifact/engines").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"capabilities": ()}, "capability: expected GPUs among SM75, .*, got none"),
        ({"capabilities": ("SM90",)}, "got SM90"),
        ({"runtime": "cuda"}, "runtime: expected one of tensorrt, tensorrt-rtx, got 'cuda'"),
        ({"cache": 81}, "--cache-length: expected an integer from 2 to 80, got 81"),
        ({"source": 81}, "--max-source: expected an integer from 1 to 80, got 81"),
        ({"cache": 1}, "--cache-length: expected an integer from 2 to 80, got 1"),
        ({"batch": 1024, "beams": 1025}, "--max-batch times --max-beams: expected at most 1048576 rows, got 1049600"),
        ({"prompt": 25}, "--max-prompt: expected an integer from 1 to 24, which is the cache's length .*, got 25"),
        (
            {"batch": 0, "beams": -1},
            r"--max-batch: expected an integer from 1(?s:.*)--max-beams: expected an integer from 1",
        ),
        ({"switches": Switches(refit=True)}, "refit: its builder needs a CUDA driver"),
        ({"switches": Switches(any_version=True)}, "any-version: its plans are of one version"),
        ({"switches": Switches(any_hardware=True)}, "any-hardware: name every GPU instead"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_is(
    asked: dict[str, Any], message: str, artifacts: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        engines.build(artifacts("bart").path, tmp_path / "out", replace(SMALL, **asked))
    assert not list(tmp_path.iterdir())


def test_the_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError("libnvonnxparser.so.11: cannot open shared object file")

    monkeypatch.setattr(engine, "import_module", missing)
    engine._module.cache_clear()
    with pytest.raises(MissingDependencyError, match=r'pip install "tensorrt-cu13>=10\.16"(?s:.*)libnvonnxparser'):
        Engine("tensorrt", (), Switches())
    engine._module.cache_clear()


def attention(size: int, folder: Path, *, lengths: bool = False) -> Path:
    """Attention in float16 with a head of this size; with lengths of its keys, which the parser drops."""
    kind = f"float16[2,1,8,{size}]"
    model = parsed(f"({kind} q, {kind} k, {kind} v, int64[2] n) => ({kind} y) {{ y = Attention (q, k, v) }}")
    node = next(iter(model.graph))
    node.name = "layer.0/Attention_7"
    if lengths:
        node.resize_inputs(7)
        node.replace_input_with(6, model.graph.inputs[3])
    else:
        del model.graph.inputs[3]
    ir.save(model, folder / "decoder.onnx")
    return folder / "decoder.onnx"


def test_an_input_that_the_parser_drops_is_refused_before_the_builder_crashes_on_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not parse decoder; (?s:.*)the input n is dropped"):
        Engine("tensorrt-rtx", ["SM89"], Switches()).build(attention(64, tmp_path, lengths=True), (), quiet)


@pytest.mark.parametrize(("size", "apart"), [(16, 0), (64, 0), (256, 0), (512, 1)])
def test_attention_without_a_kernel_is_taken_apart(size: int, apart: int, tmp_path: Path) -> None:
    built, _ = Engine("tensorrt-rtx", ["SM89"], Switches()).build(attention(size, tmp_path), (), quiet)
    assert built.apart == apart


@pytest.mark.parametrize(("queries", "apart"), [((1, 1, 1), 1), ((1, 1, 2), 0)])
def test_attention_of_one_token_alone_has_no_kernel(queries: tuple[int, int, int], apart: int, tmp_path: Path) -> None:
    """Why a step's profile takes two: to go when this fails."""
    kinds = [f"float16[R,2,{length},64]" for length in ("Q", 32, 32)]
    model = parsed(f"({kinds[0]} q, {kinds[1]} k, {kinds[2]} v) => ({kinds[0]} y) {{ y = Attention (q, k, v) }}")
    ir.save(model, tmp_path / "decoder.onnx")
    profile = Profile(name="step", axes={"R": (1, 4, 4), "Q": queries})
    built, _ = Engine("tensorrt-rtx", ["SM89"], Switches()).build(tmp_path / "decoder.onnx", [profile], quiet)
    assert built.apart == apart


def test_a_refusal_names_the_node_and_says_what_to_try(tmp_path: Path) -> None:
    model = parsed("(float[2,8,8] x) => (float[2] y) { y = Det(x) }")
    next(iter(model.graph)).name = "layer.0/Det_7"
    ir.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(
        UsageError, match=r"does not parse decoder \(node layer\.0/Det_7\); export in another precision"
    ):
        Engine("tensorrt-rtx", ["SM89"], Switches()).build(tmp_path / "decoder.onnx", (), quiet)


def test_one_row_has_a_profile_of_its_own_where_kernels_are_tuned_for_it(artifacts: Make) -> None:
    """TensorRT tunes kernels for profiles; TensorRT-RTX makes them where a plan runs."""
    planned = engines.plan(artifacts("bart").path, replace(SMALL, runtime="tensorrt", capabilities=()))
    single = Profile.from_json(planned["plans"]["decoder"]["profiles"][0], "", [])
    assert single == Profile(name="single", axes={"B": (1, 1, 1), "Q": (1, 1, 2), "R": (1, 1, 1), "T": (1, 16, 16)})


def test_sizes_come_from_the_model(artifacts: Make) -> None:
    sizes = Sizes.of(artifacts("bart").manifest)
    assert sizes == Sizes(batch=8, beams=4, source=80, prompt=64, cache=80)
    assert Sizes.of(artifacts("t5").manifest).cache == 512


def test_the_command_says_what_it_would_build_and_what_it_built(
    artifacts: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["engine", str(artifacts("bart").path), "--capability", "sm89", "--max-batch", "2", "--max-beams", "2"]
    command += ["--max-source", "16", "--max-prompt", "8", "--cache-length", "24", "--quiet"]
    assert _exit([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "would be built in fp32 with tensorrt-rtx for SM89" in text
    assert "profile prefill: B 1 to 2 (tuned for 2), Q 1 to 8 (tuned for 4), R 1 to 4 (tuned for 4)" in text
    assert _exit([*command, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plans"]["decoder"]["nodes"]["Attention"] == 4
    assert not list(tmp_path.iterdir())
    assert _exit([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["builds"]["decoder"]["layers"]["KV_CACHE_UPDATE"] == 4
    assert said["plans"]["decoder"]["profiles"] == planned["plans"]["decoder"]["profiles"]
    assert _exit([*command, "--refit"]) == 2


def _exit(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    return int(done.value.code or 0)


def test_an_artifact_for_onnx_runtimes_operators_is_refused(artifacts: Make, tmp_path: Path) -> None:
    models = graphs(artifacts("bart"), "int4")
    for model in models.values():
        ort.lower_for_cpu(model, "int4")
    with ArtifactWriter(tmp_path / "artifact") as writer:
        lowered = twin(artifacts("bart"), models, writer.directory)
        shutil.copyfile(artifacts("bart").file(cases.FILE), writer.directory / cases.FILE)
        writer.commit(lowered.manifest)
    with pytest.raises(UsageError, match=r"not for TensorRT(?s:.*)MatMulNBits"):
        engines.build(tmp_path / "artifact", None, SMALL)
