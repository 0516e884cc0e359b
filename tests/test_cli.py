"""The command line as a shell sees it: exit codes, one document on stdout, progress on stderr, and how long a word takes."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.runtime.artifacts import edit, put
from tests.runtime.test_opened import swap_files
from txopt.runtime import running
from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import FILE as CASES

TXOPT = str(Path(sys.executable).with_name("txopt"))
SOURCE = "txopt.examples.g2p.model:factory"
CLIP = Path(__file__).parent / "data/speech/sense_and_sensibility_01_austen_64kb-0880.wav"
LIBRARIES = "import numpy, onnxruntime, rich.console, typer"  # what every run loads, whoever calls
SHARE = 4  # of the processor seconds that loading them takes: how long a word may be on its way


def txopt(*arguments: object, stdin: str = "", cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([TXOPT, *map(str, arguments)], capture_output=True, text=True, input=stdin, cwd=cwd)


def txopt_without(package: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The same, where ``package`` is not installed."""
    code = f"""
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name={package!r})
sys.meta_path.insert(0, Missing)
from txopt.cli import main
main()
"""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def deviating(g2p: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact artifact whose reference cases say something else than its graphs."""
    copy = tmp_path_factory.mktemp("deviating") / "artifact"
    copy.mkdir()
    for file in g2p.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / CASES).open("rb") as header:
        metadata = json.loads(header.read(int.from_bytes(header.read(8), "little")))["__metadata__"]
    tensors = load_file(copy / CASES)
    tensors["padded/expected/self_key.1"] += 1
    save_file(tensors, copy / CASES, metadata)
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    data = (copy / CASES).read_bytes()
    manifest["files"][CASES] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return copy


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """What ``txopt export --json`` said, and what it made."""
    out = tmp_path_factory.mktemp("exported") / "artifact"
    return txopt("export", SOURCE, out, "--json"), out


def test_0_an_export_is_one_document_on_stdout_and_its_stages_on_stderr(
    exported: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    done, out = exported
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["path"] == str(out)
    assert document["parity"]["passed"] is True
    lines = done.stderr.splitlines()
    assert [line.split()[1] for line in lines][:3] == ["load", "record", "trace"]
    assert all(line.startswith(f"[{index}/{len(lines)}] ") for index, line in enumerate(lines, start=1)), done.stderr
    assert Artifact.open(out).manifest.parity["passed"]


def test_0_verify_is_one_document_and_silent(g2p: Artifact) -> None:
    done = txopt("verify", g2p.path, "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert document["deviations"] == document["failures"] == []


def test_0_run_says_a_word_and_nothing_else(g2p: Artifact) -> None:
    done = txopt("run", g2p.path, "--text", "cat")
    assert (done.returncode, done.stdout, done.stderr) == (0, "K AE1 T\n", "")


def test_2_a_scheme_that_does_not_exist_at_a_precision(g2p: Artifact, tmp_path: Path) -> None:
    done = txopt("quantize", g2p.path, tmp_path / "out", "--scheme", "static", "--precision", "int4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "precision: expected one of int8, fp8" in done.stderr


def test_2_an_export_with_options_of_another_precision_or_scheme(tmp_path: Path) -> None:
    """Said before anything is traced."""
    for given, said in (
        (("--precision", "fp16", "--scheme", "static"), "scheme: is for int8, int4, fp8; leave it out at fp16"),
        (("--precision", "int4", "--scheme", "static"), "precision: expected one of int8, fp8, got 'int4'"),
        (
            ("--precision", "int8", "--target", "tensorrt", "--scheme", "rows"),
            "for tensorrt take the scheme weights or static",
        ),
        (("--precision", "int8", "--scheme", "static", "--method", "gptq"), "method: expected one of absmax"),
    ):
        done = txopt("export", SOURCE, tmp_path / "out", *given)
        assert (done.returncode, list(tmp_path.iterdir())) == (2, []), given
        assert said in done.stderr


def test_0_inspect_is_one_document(g2p: Artifact) -> None:
    done = txopt("inspect", g2p.path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["family"] == "custom"


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_0_a_line_of_stdin_is_a_line_of_stdout_blank_ones_too(g2p: Artifact, stream: tuple[str, ...]) -> None:
    done = txopt("run", g2p.path, "--text", "-", *stream, stdin="\ncat\n\n  \ndog")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\nK AE1 T\n\n\nD AA1 G\n"


def test_0_json_of_several_lines_is_one_document_with_an_entry_for_each(g2p: Artifact) -> None:
    done = txopt("run", g2p.path, "--text", "-", "--json", stdin="cat\n\ndog\n")
    assert done.returncode == 0
    documents = json.loads(done.stdout)
    assert [document["text"] for document in documents] == ["K AE1 T", "", "D AA1 G"]
    assert documents[1]["ids"] == []


def test_0_the_help_says_what_a_blank_line_gives() -> None:
    assert "a blank line gives a blank line" in " ".join(txopt("run", "--help").stdout.split())


def test_0_a_stream_with_json_is_one_document(g2p: Artifact) -> None:
    done = txopt("run", g2p.path, "--text", "cat", "--stream", "--json")
    if done.returncode == 2:  # to refuse the pair would be right too
        assert done.stdout == ""
        return
    assert done.returncode == 0
    assert json.loads(done.stdout)["text"] == "K AE1 T"


def test_0_a_stream_is_the_text(g2p: Artifact) -> None:
    done = txopt("run", g2p.path, "--text", "transformer", "--stream")
    assert done.returncode == 0
    assert done.stdout == txopt("run", g2p.path, "--text", "transformer").stdout


def test_0_arrays_are_read_from_a_file(g2p: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.array([[4, 5, 2]]), attention_mask=np.ones((1, 3), np.int64))
    done = txopt("run", g2p.path, "--ids", tmp_path / "ids.npz", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)["ids"]
    assert row[0] == 1
    assert row[-1] == 2


def test_0_ids_are_streamed_as_they_come_and_are_what_is_printed_without(g2p: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.array([[7, 5, 24, 2]]))
    asked = ("run", g2p.path, "--ids", tmp_path / "ids.npz")
    done = txopt(*asked, "--stream")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == txopt(*asked).stdout
    assert len(done.stdout.split()) > 3
    pieces: list[str] = []
    run = running.run(g2p.path, running.Request(ids=tmp_path / "ids.npz"), threads=1, pieces=pieces.append)
    (document, line), *more = run
    assert (line, more) == ("", [])
    assert [int(piece) for piece in pieces] == document["ids"][0]


def test_2_a_stream_of_ids_is_one_row(g2p: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.array([[7, 5, 24, 2]] * 2))
    done = txopt("run", g2p.path, "--ids", tmp_path / "ids.npz", "--stream")
    assert (done.returncode, done.stdout) == (2, "")
    assert "one row of ids as it comes, got 2: give one source, or leave out --stream" in done.stderr


# what is asked of ``run``, and what the message on stderr must say; {artifact} is g2p's
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing there": (("no-such-artifact", "--text", "cat"), "no-such-artifact"),
    "a directory that is no artifact": ((str(CLIP.parent), "--text", "cat"), "manifest.json"),
    "a file": ((str(CLIP), "--text", "cat"), "found a file"),
    "audio for a text model": (("{artifact}", "--audio", str(CLIP)), "takes text, not audio"),
    "an image for a text model": (("{artifact}", "--image", "cat.png"), "takes text, not image"),
    "two inputs": (("{artifact}", "--text", "cat", "--audio", str(CLIP)), "--text and --audio"),
    "no input": (("{artifact}",), "expected one of --text, --audio, --image, --ids"),
    "no lines on stdin": (("{artifact}", "--text", "-"), "stdin"),
    "no beams": (("{artifact}", "--text", "cat", "--num-beams", "0"), "num_beams"),
    "a language the model has not": (("{artifact}", "--text", "cat", "--target-language", "de"), "no language tokens"),
    "an option of speech": (("{artifact}", "--text", "cat", "--language", "de"), "language"),
    "a device there is not": (("{artifact}", "--text", "cat", "--device", "tpu"), "tpu"),
    "a temperature beyond cold": (("{artifact}", "--text", "cat", "--temperature", "1e-320"), "temperature"),
    "more beams than there may be": (("{artifact}", "--text", "cat", "--num-beams", "1000000000"), "at most 4096"),
    "a temperature of nought": (("{artifact}", "--text", "cat", "--temperature", "0"), "leave out --temperature"),
    "a temperature below nought": (("{artifact}", "--text", "cat", "--temperature", "-1"), "--temperature -1"),
    "a stream of beams": (("{artifact}", "--text", "cat", "--stream", "--num-beams", "2"), "cannot be streamed"),
    "no threads": (("{artifact}", "--text", "cat", "--threads", "0"), "threads"),
    "arrays that are not there": (("{artifact}", "--ids", "no-such.npz"), "no-such.npz"),
    "a number that is none": (("{artifact}", "--text", "cat", "--num-beams", "many"), "--num-beams"),
    "an option there is not": (("{artifact}", "--text", "cat", "--no-such-option"), "no-such-option"),
}


@pytest.mark.parametrize("what", WRONG)
def test_2_wrong_input_is_one_message_and_no_traceback(what: str, g2p: Artifact, tmp_path: Path) -> None:
    arguments, said = WRONG[what]
    done = txopt("run", *(part.format(artifact=g2p.path) for part in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_2_text_for_a_speech_model(g2p: Artifact, tmp_path: Path) -> None:
    """The front end alone decides it, so a speech model's manifest is enough."""
    manifest: dict[str, Any] = json.loads((g2p.path / "manifest.json").read_text("utf-8"))
    manifest["task"], manifest["frontend"] = (
        "speech-to-text",
        {
            "type": "audio",
            "feature_size": 80,
            "sampling_rate": 16000,
            "n_fft": 400,
            "hop_length": 160,
            "chunk_length": 30,
            "padding_value": 0.0,
        },
    )
    for file in g2p.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    done = txopt("run", tmp_path, "--text", "cat")
    assert (done.returncode, done.stdout) == (2, "")
    assert "takes audio, not text" in done.stderr


def edited(g2p: Artifact, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(g2p.path, out)
    edit(out, change)
    return out


@pytest.mark.parametrize("given", ["--text", "--audio", "--image"])
def test_2_a_model_of_arrays_asks_for_them(given: str, g2p: Artifact, tmp_path: Path) -> None:
    arrays = edited(g2p, tmp_path / "arrays", put("frontend", {"type": "arrays"}))
    done = txopt("run", arrays, given, "cat")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no tokenizer or processor for {given}" in done.stderr
    assert "--ids FILE.npz with input_ids and attention_mask" in done.stderr
    assert "model.generate" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("frontend/max_source_length", "64"), "frontend.max_source_length: expected an integer"),
        (put("frontend/languages", 5), "frontend.languages: expected an object"),
        (put("frontend/source_template", "junk"), "frontend.source_template: expected a list"),
        (put("frontend/add_special_tokens", None), "frontend.add_special_tokens: expected true or false"),
        (swap_files, "are not those of its manifest"),
    ],
)
def test_2_a_manifest_edited_by_hand(
    change: Callable[[dict[str, Any]], None], message: str, g2p: Artifact, tmp_path: Path
) -> None:
    done = txopt("run", edited(g2p, tmp_path / "edited", change), "--text", "cat")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_2_wrong_options_of_an_export_are_told_at_once(tmp_path: Path) -> None:
    done = txopt("export", SOURCE, "out", "--precision", "fp7", "--target", "abacus", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "fp7" in done.stderr
    assert "abacus" in done.stderr
    assert not list(tmp_path.iterdir())


def test_2_an_artifact_is_not_replaced_unasked(exported: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    before = {file.name: file.read_bytes() for file in exported[1].iterdir()}
    done = txopt("export", SOURCE, exported[1], "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--overwrite" in done.stderr
    assert {file.name: file.read_bytes() for file in exported[1].iterdir()} == before


def test_3_an_artifact_that_deviates(deviating: Path) -> None:
    done = txopt("verify", deviating)
    assert (done.returncode, done.stdout) == (3, "")
    assert 'first deviation: case "padded": self_key of layer 1' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_4_export_without_its_packages_says_what_to_install(package: str, tmp_path: Path) -> None:
    done = txopt_without(package, "export", SOURCE, tmp_path / "out")
    assert done.returncode == 4, done.stderr
    assert package in done.stderr
    assert 'pip install "txopt[export]"' in done.stderr
    assert not list(tmp_path.iterdir())


def test_4_a_device_without_its_engine(g2p: Artifact) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU's engine here")
    done = txopt("run", g2p.path, "--text", "cat", "--device", "cuda")
    assert (done.returncode, done.stdout) == (4, "")
    assert "onnxruntime-gpu" in done.stderr or "txopt[gpu]" in done.stderr


def test_2_a_bench_of_engines_that_are_not_there(g2p: Artifact) -> None:
    done = txopt("bench", g2p.path, "--device", "tensorrt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "txopt engine" in done.stderr


def test_2_a_bench_on_one_device_against_a_peer_on_another(g2p: Artifact) -> None:
    done = txopt("bench", g2p.path, "--device", "cuda", "--against", "torch", "--source", SOURCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--against torch computes on the CPU, and --device cuda does not" in done.stderr


def test_0_a_bench_is_one_document(g2p: Artifact) -> None:
    few = ("--batch", 1, "--repeats", 1, "--new-tokens", 4, "--source-length", 4)
    done = txopt("bench", g2p.path, *few, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["device"] == "cpu"
    assert document["peak_mb"] > document["base_mb"] > 0


def test_0_somebody_who_reads_no_further_is_no_error(g2p: Artifact) -> None:
    command = f"set -o pipefail; {TXOPT} inspect {g2p.path} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def processor_seconds(call: Callable[[], "subprocess.CompletedProcess[str]"]) -> float:
    """Of the processes that the call starts, the least of five: a busy machine does not change that much."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert call().returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_a_word_is_said_in_no_time(g2p: Artifact) -> None:
    """Start of the process, check of all hashes and the answer, on the scale of the machine that runs this.

    benchmarks/main_road.py has the seconds on the wall.
    """
    loading = processor_seconds(
        lambda: subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=False)
    )
    said = processor_seconds(lambda: txopt("run", g2p.path, "--text", "transformer", "--threads", "1"))
    assert said < SHARE * loading
