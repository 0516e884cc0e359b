"""``txopt optimize`` and ``txopt inspect`` of a .onnx file as a shell sees them: exit codes, one document, plain messages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

TXOPT = str(Path(sys.executable).with_name("txopt"))

GELU = "a = Div(x, root) t = Erf(a) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)"


def txopt(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([TXOPT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def save(folder: Path, nodes: str = GELU, opset: int = 13) -> None:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> net (float[N,4] x) => (float[N,4] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for name, number in (("root", 2**0.5), ("one", 1.0), ("half", 0.5), ("ratio", 0.5)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    onnx.save(model, folder / "in.onnx")


def test_0_optimize_says_what_it_did_and_the_stages_on_stderr(tmp_path: Path) -> None:
    save(tmp_path)
    done = txopt("optimize", "in.onnx", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out: 5 nodes of opset 13 became 1\n")
    assert "  Gelu: 1 fused, 0 refused\n" in done.stdout
    assert "  verified against in.onnx at N=2 and N=3: largest error " in done.stdout
    assert [line.split()[1] for line in done.stderr.splitlines()][:3] == ["read", "convert", "clean"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "weights.data"}


def test_0_prove_tells_what_held(tmp_path: Path) -> None:
    save(tmp_path)
    done = txopt("optimize", "in.onnx", "out", "--prove", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  Gelu: 1 fused, 0 refused\n    1 of 1 proved alone: largest error " in done.stdout
    done = txopt("optimize", "in.onnx", "out", "--prove", "--json", "--quiet", "--overwrite", cwd=tmp_path)
    proof = json.loads(done.stdout)["fusions"]["Gelu"]["proof"]
    assert (proof["held"], proof["unproved"]) == (1, [])
    assert proof["largest_error"] < 1e-6


def test_0_optimize_is_one_document_and_silent(tmp_path: Path) -> None:
    save(tmp_path)
    done = txopt("optimize", "in.onnx", "out", "--json", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["path"], document["source"], document["fused"]) == ("out", "in.onnx", 1)
    assert document["fusions"]["Gelu"] == {"fused": 1, "refused": []}
    assert document["parity"]["largest_error"] <= document["parity"]["tolerance"]


def test_0_nothing_to_fuse_is_said(tmp_path: Path) -> None:
    save(tmp_path, "y = Relu(x)")
    done = txopt("optimize", "in.onnx", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert "  nothing to fuse\n" in done.stdout


def test_0_inspect_tells_what_would_fuse_and_what_not(tmp_path: Path) -> None:
    save(tmp_path, GELU.replace("y = Mul(h, s)", "g = Mul(h, s) y = Add(g, s)"))
    done = txopt("inspect", "in.onnx", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in.onnx: opset 13, 6 nodes" in done.stdout
    assert "  input x: float [N,4]\n" in done.stdout
    assert "  nothing to fuse\n  Gelu: 0 would fuse, 1 refused\n    Erf_1: its product is not x/2" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["in.onnx"]


def test_0_inspect_is_one_document_even_where_optimize_would_refuse(tmp_path: Path) -> None:
    save(tmp_path, "y = Relu(x)", opset=10)
    done = txopt("inspect", "in.onnx", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["operators"] == {"Relu": 1}
    assert "found opset 10" in document["problem"]
    assert "what would fuse cannot be told" in txopt("inspect", "in.onnx", cwd=tmp_path).stdout


@pytest.mark.parametrize("command", [("optimize", "in.onnx", "out"), ("inspect", "in.onnx")])
@pytest.mark.parametrize(
    ("content", "said"), [(None, "found nothing there"), (b"no graph at all", "expected an ONNX file")]
)
def test_2_what_is_no_graph_is_one_message(
    command: tuple[str, ...], content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "in.onnx").write_bytes(content)
    before = list(tmp_path.iterdir())
    done = txopt(*command, "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == before


def test_2_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    save(tmp_path)
    assert txopt("optimize", "in.onnx", "out", "--quiet", cwd=tmp_path).returncode == 0
    done = txopt("optimize", "in.onnx", "out", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--overwrite" in done.stderr
    done = txopt("optimize", "in.onnx", "out/inner", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is inside the optimized model" in done.stderr
    assert txopt("optimize", "in.onnx", "out", "--quiet", "--overwrite", cwd=tmp_path).returncode == 0


def test_3_a_graph_that_does_not_answer_the_same_twice(tmp_path: Path) -> None:
    save(tmp_path, "y = Dropout(x, ratio, training)")
    done = txopt("optimize", "in.onnx", "out", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "y deviates" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["in.onnx"]


PAST = "present = Concat<axis = 2>(past, new) y = Attention(new, present, present)"


def save_a_step(folder: Path, nodes: str = PAST) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    net (float[B,2,L,4] new, float[B,2,P,4] past) => (float[B,2,L,4] y, float[B,2,N,4] present) {{ {nodes} }}"""
    onnx.save(onnx.parser.parse_model(text), folder / "in.onnx")


def test_0_in_place_cache_says_what_became_a_buffer(tmp_path: Path) -> None:
    save_a_step(tmp_path)
    done = txopt("optimize", "in.onnx", "out", "--in-place-cache", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  1 buffer of cache_length places, written in place at cache_position: past as present\n" in done.stdout
    assert (
        "at B=2, P=6, L=4, cache_length=14 and B=3, P=9, L=1, cache_length=11 and 3 other sets of sizes: largest error "
        in done.stdout
    )
    done = txopt("optimize", "in.onnx", "out", "--in-place-cache", "--json", "--quiet", "--overwrite", cwd=tmp_path)
    cache = json.loads(done.stdout)["cache"]
    assert cache == {"buffers": {"past": "present"}, "position": "cache_position", "length": "cache_length"}


def test_2_in_place_cache_of_a_file_without_a_past(tmp_path: Path) -> None:
    save(tmp_path)
    done = txopt("optimize", "in.onnx", "out", "--in-place-cache", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "in.onnx: nothing to turn into a buffer; expected Concat(past, new) along axis 2" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["in.onnx"]
