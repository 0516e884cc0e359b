"""Folders that optimum-onnx exported: one decoder with buffers, every weight once, and what the files themselves say."""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

import txopt
from txopt.exporter import optimum, optimum_child, target_tables
from txopt.exporter.optimum_folder import ENCODER, MERGED, PLAIN, STEP, is_folder
from txopt.exporter.pipeline import STAGES, export, record_and_replay
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ParityError, SourceError, UsageError

Array = NDArray[Any]

DATA = Path(__file__).parents[1] / "data" / "optimum"
FAMILIES = ("t5", "bart", "marian", "whisper")
VARIANTS = {"plain": (MERGED,), "merged": (PLAIN, STEP)}  # what is taken away from what Optimum writes
LAYERS, NEW_TOKENS = 2, 20


def folder(family: str, where: Path, *without: str) -> Path:
    """What Optimum wrote for ``family``, less some of its files."""
    made = where / family
    with tarfile.open(DATA / f"{family}.tar.xz") as archive:
        archive.extractall(made, filter="data")
    for name in without:
        (made / name).unlink()
    return made


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The child's work without a child, which would import torch once more for every export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optimum,
            "ask",
            lambda module, source, task, progress: optimum_child.work(
                {"source": str(source), **task}, progress or (lambda _: None)
            ),
        )
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, in_process: None) -> Callable[[str, str], tuple[Path, Artifact]]:
    """(folder, artifact) of a family and a variant, each made once."""
    made: dict[tuple[str, str], tuple[Path, Artifact]] = {}

    def make(family: str, variant: str) -> tuple[Path, Artifact]:
        if (family, variant) not in made:
            source = folder(family, tmp_path_factory.mktemp(variant), *VARIANTS[variant])
            made[family, variant] = source, export(source, source.parent / "out")
        return made[family, variant]

    return make


def both(function: Any) -> Any:
    variants = pytest.mark.parametrize("variant", VARIANTS)
    return pytest.mark.parametrize("family", FAMILIES)(variants(function))


@both
def test_every_block_is_one_attention_and_every_cache_a_buffer(exported: Any, family: str, variant: str) -> None:
    _, artifact = exported(family, variant)
    nodes = {name: report["nodes"] for name, report in artifact.manifest.fusion.items()}
    assert nodes["encoder"]["Attention"] == LAYERS
    assert nodes["decoder"]["Attention"] == 2 * LAYERS
    assert nodes["decoder"]["TensorScatter"] == 2 * LAYERS
    for operator in ("Softmax", "If", "ScatterND", "Erf", "Pow"):
        assert operator not in nodes["encoder"].keys() | nodes["decoder"].keys()
    for graph in artifact.manifest.fusion.values():
        assert all(not report["refused"] for report in graph["patterns"].values())
        assert graph["patterns"]["QKV"]["fused"] == LAYERS


@both
def test_the_export_is_verified_with_beams_and_against_the_files(exported: Any, family: str, variant: str) -> None:
    _, artifact = exported(family, variant)
    report = txopt.verify(artifact.path)
    assert report.passed
    assert report.largest_error < 1e-5
    assert report.ids == {
        "single/greedy": "1 of 1 rows equal",
        "single/beam": "1 of 1 rows equal",
        "padded/greedy": "3 of 3 rows equal",
        "padded/beam": "3 of 3 rows equal",
    }
    assert artifact.manifest.source["kind"] == "optimum"


@both
def test_generate_says_what_a_loop_over_the_original_files_says(
    exported: Any, tmp_path: Path, family: str, variant: str
) -> None:
    _, artifact = exported(family, variant)
    random = np.random.default_rng(3)
    inputs: dict[str, Array] = {"input_features": random.normal(size=(3, 8, 60)).astype(np.float32)}
    if family != "whisper":
        mask = (np.arange(9) < np.array([[9], [4], [7]])).astype(np.int64)
        inputs = {"input_ids": random.integers(4, 97, mask.shape), "attention_mask": mask}
    expected = greedy(folder(family, tmp_path), inputs, artifact.manifest.generation)
    model = txopt.load(artifact.path)
    options = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, "no_repeat_ngram_size": 1}
    found = model.generate(**inputs, **options)
    assert found.sequences.tolist() == expected.tolist()
    assert len(set(expected.ravel().tolist())) > NEW_TOKENS // 2


def greedy(files: Path, inputs: dict[str, Array], facts: dict[str, Any]) -> Array:
    """As Optimum runs them: the first token by decoder_model.onnx, the others by decoder_with_past_model.onnx.

    No token comes twice: left alone, random weights repeat one or two.
    """
    encoder, first, step = (onnxruntime.InferenceSession(files / name) for name in (ENCODER, PLAIN, STEP))
    (memory,) = encoder.run(None, inputs)
    masked = {"encoder_attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    ids = np.full((len(memory), 1), facts["decoder_start_token_id"])
    finished = np.zeros(len(ids), bool)
    past: dict[str, Array] = {}
    for index in range(NEW_TOKENS):
        session = step if past else first
        feeds = {"input_ids": ids[:, -1:], **(past or {"encoder_hidden_states": memory}), **masked}
        names = [output.name for output in session.get_outputs()]
        answers = dict(zip(names, session.run(None, feeds), strict=True))
        past |= {k.replace("present.", "past_key_values."): v for k, v in answers.items() if k != "logits"}
        logits = answers["logits"][:, -1]
        forbidden = [*(facts.get("suppress_tokens") or []), *(word[0] for word in facts.get("bad_words_ids") or [])]
        logits[:, forbidden + (facts.get("begin_suppress_tokens") or [] if index == 0 else [])] = -np.inf
        np.put_along_axis(logits, ids, -np.inf, axis=1)
        chosen = logits.argmax(-1)
        if index == NEW_TOKENS - 1 and (end := facts.get("forced_eos_token_id")) is not None:
            chosen[:] = end if isinstance(end, int) else end[0]
        chosen[finished] = facts["pad_token_id"]
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
        finished |= chosen == facts["eos_token_id"]
        if finished.all():
            break
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_is_at_most_six_tenths_of_what_optimum_writes(exported: Any, tmp_path: Path, family: str) -> None:
    _, artifact = exported(family, "merged")
    written = sum(file.stat().st_size for file in folder(family, tmp_path).glob("*.onnx"))
    files = sum(file.stat().st_size for file in artifact.path.iterdir())
    assert files <= 0.6 * written


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_there_once(exported: Any, family: str) -> None:
    source, artifact = exported(family, "plain")
    contents = set()
    for name in (ENCODER, PLAIN):
        graph = onnx.load(source / name).graph
        large = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
        contents |= {(array.size, tuple(sorted(array.ravel()[:64]))) for array in large if array.nbytes >= 1024}
    distinct = sum(size * 4 for size, _ in contents)
    # A page of alignment for each tensor, and the tables that were formulas; the transposed embedding counts double in ``distinct``.
    assert (artifact.path / "weights.data").stat().st_size <= 1.5 * distinct


def test_a_child_process_does_it_and_tells_its_stages(tmp_path: Path) -> None:
    stages: list[str] = []
    source = folder("bart", tmp_path)
    artifact = export(source, tmp_path / "out", progress=stages.append)
    assert tuple(stages) == STAGES
    assert sorted(artifact.manifest.source["files"]) == ["config.json", PLAIN, ENCODER]
    assert artifact.manifest.frontend["type"] == "text"
    assert isinstance(txopt.load(artifact.path).pipeline("text")("w5 w6 w7"), str)
    assert record_and_replay(artifact, source).passed


def test_a_checkpoint_beside_the_files_is_what_is_exported(tmp_path: Path) -> None:
    source = folder("t5", tmp_path)
    assert is_folder(source)
    assert is_folder(str(source))
    assert not is_folder(tmp_path)
    (source / "model.safetensors").touch()
    assert not is_folder(source)


def without_decoders(source: Path) -> None:
    for name in (PLAIN, MERGED):
        (source / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        (source / name).write_bytes((source / name).read_bytes()[:90_000])

    return damage


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))

    return change


def swapped(source: Path) -> None:
    shutil.copy(source / STEP, source / PLAIN)


def contrib(source: Path) -> None:
    model = onnx.load(source / PLAIN)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    next(node for node in model.graph.node if node.op_type == "Erf").domain = "com.microsoft"
    onnx.save(model, source / PLAIN)


def halved(source: Path) -> None:
    """As with --dtype fp16, as far as the ends of the encoder show it."""
    model = onnx.load(source / ENCODER)
    (states,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("Cast", [states.name], ["narrow"], to=onnx.TensorProto.FLOAT16))
    states.name, states.type.tensor_type.elem_type = "narrow", onnx.TensorProto.FLOAT16
    onnx.save(model, source / ENCODER)


BAD = {
    "no encoder": (lambda source: (source / ENCODER).unlink(), "no encoder_model.onnx"),
    "no decoder": (without_decoders, "decoder_with_past_model.onnx alone cannot make"),
    "no configuration": (lambda source: (source / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda source: (source / "config.json").write_text("{"), "config.json cannot be read"),
    "no JSON for generation": (
        lambda source: (source / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
    "an unknown family": (configured(model_type="bigbird_pegasus"), "no family knows model_type 'bigbird_pegasus'"),
    "no encoder-decoder": (configured(model_type="bert"), "is of an encoder"),
    "another vocabulary": (configured(vocab_size=98), "vocabulary of 98, the decoder's logits have 99"),
    "another width": (configured(d_model=64), "states of width 64, as config.json says, found 32"),
    "a family with other inputs": (configured(model_type="whisper"), "expected the inputs input_features"),
    "a truncated encoder": (cut(ENCODER), "encoder_model.onnx: expected an ONNX file"),
    "a truncated decoder": (cut(PLAIN), "decoder_model.onnx: expected an ONNX file"),
    "the step in the place of the whole": (swapped, "expected the inputs input_ids, encoder_hidden_states"),
    "half precision": (halved, "encoder_model.onnx: expected float32, found FLOAT16; export it without --dtype"),
    "another engine's operators": (contrib, "operators of the ONNX standard alone"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(in_process: None, tmp_path: Path, case: str) -> None:
    damage, message = BAD[case]
    source = folder("bart", tmp_path)
    damage(source)
    with pytest.raises(SourceError, match=message):
        export(source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"bart"}


def test_a_precision_that_the_files_do_not_have_is_refused(in_process: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected fp32, got 'fp16'"):
        export(folder("t5", tmp_path), tmp_path / "out", precision="fp16")
    assert {file.name for file in tmp_path.iterdir()} == {"t5"}


def test_a_bias_off_by_one_is_refused_and_leaves_nothing(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = target_tables.self_mask
    shifted = lambda *given: target_tables.SelfMask(bias=original(*given).bias[1:])  # noqa: E731
    monkeypatch.setattr(target_tables, "self_mask", shifted)
    with pytest.raises(ParityError, match="logits"):
        export(folder("t5", tmp_path), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"t5"}
