"""Every rewrite is replayed alone: what does not hold is refused by name and left as it was, the rest is fused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.attention_graphs import feeds, model
from tests.exporter.plain_engine import scale_attention
from txopt.exporter import foreign_child, pipeline
from txopt.exporter.fusion import attention, fuse, proof, qkv, rms_norm, scale
from txopt.exporter.fusion.report import NOTHING, Report
from txopt.exporter.graph import count
from txopt.runtime.artifact import Artifact
from txopt.runtime.parity import verify
from txopt.summary import of_artifact, of_optimized

Make = Callable[[str], Path]
Rewrite = Callable[..., None]

BLOCK = "m{0} = Mul({1}, half) a{0} = Add(m{0}, bias) p{0} = Softmax(a{0}) {2} = MatMul(p{0}, v) "
TWO = (
    "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) "
    + BLOCK.format(1, "s", "x")
    + "t = MatMul(x, kt) "
    + BLOCK.format(2, "t", "y")
)
FIRST, SECOND = "block/Softmax_4", "block/Softmax_9"


@pytest.fixture
def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attention comes out scaled by a hundredth too much."""

    def broken(graph: ir.Graph, block: Any, masks: Any) -> None:
        factor = 1.01 if block.name.startswith(SECOND) else 1
        rewrite(graph, type(block)(**{**vars(block), "scale": block.scale * factor}), masks)

    rewrite = attention.rewrite
    monkeypatch.setattr(attention, "rewrite", broken)


def test_what_holds_is_fused_and_the_worst_error_named() -> None:
    graph = model(TWO)
    report = proof.prove(attention.fuse, graph, [feeds(graph)])
    assert (report.fused, report.refused) == (2, [])
    assert report.proof is not None
    assert (report.proof.held, report.proof.unproved) == (2, ())
    assert report.proof.largest_error < 1e-6
    assert report.proof.at in (FIRST, SECOND) or report.proof.largest_error == 0


@pytest.mark.usefixtures("wrong_scale")
def test_what_does_not_hold_is_refused_by_name_and_the_rest_kept() -> None:
    graph = model(TWO)
    report = proof.prove(attention.fuse, graph, [feeds(graph)])
    assert report.fused == 1
    (refusal,) = report.refused
    assert refusal.startswith(f"{SECOND}: fused, but it does not hold: y, error ")
    assert refusal.endswith(" (allowed 1e-04)")
    assert report.proof is not None
    assert report.proof.held == 1
    assert count(graph)["Attention"] == 1
    assert [node.name for node in graph.graph if node.op_type == "Softmax"] == [SECOND]
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)


@pytest.mark.usefixtures("wrong_scale")
def test_without_proof_nothing_is_replayed() -> None:
    reports = fuse(model(TWO), [attention.fuse])
    assert (reports["Attention"].fused, reports["Attention"].proof) == (2, None)


def test_small_numbers_are_judged_by_their_own_size() -> None:
    graph = model(TWO)
    given = feeds(graph)
    given["v"] *= np.float32(1e-7)

    def doubled(model: ir.Model, barred: Any = NOTHING) -> Report:
        report = attention.fuse(model, barred)
        scale_attention(model, 2)
        return report

    report = proof.prove(doubled, graph, [given])
    (refusal,) = report.refused  # the second block's scores are all but zero, whatever scales them
    assert refusal.startswith(f"{FIRST}: fused, but it does not hold: x, ")


def test_a_rewrite_is_replayed_through_values_that_it_changes() -> None:
    """Queries that are no longer scaled keep the name that they had: only the Attention behind them is comparable."""
    graph = model("a = Mul(q, half) t = Transpose<perm=[0,1,2,3]>(a) y = Attention<scale=1.0>(t, k, v)")
    report = proof.prove(scale.fuse, graph, [feeds(graph)])
    assert (report.fused, report.proof and report.proof.held) == (1, 1)


@pytest.mark.parametrize(
    ("given", "reason"),
    [([], "no inputs"), ([{"q": np.zeros((1, 2, 3, 4), np.float32)}], "no kernel runs it: ")],
    ids=["no feeds", "feeds that are missing"],
)
def test_what_cannot_be_replayed_is_said(given: Sequence[dict[str, Any]], reason: str) -> None:
    report = proof.prove(attention.fuse, model(TWO), given)
    assert (report.fused, report.refused) == (2, [])
    assert report.proof is not None
    assert report.proof.held == 0
    assert [line.partition(": not proved: ")[0] for line in report.proof.unproved] == [FIRST, SECOND]
    assert all(reason in line for line in report.proof.unproved)


def test_bfloat16_is_replayed_by_the_reference_implementation() -> None:
    graph = model(TWO, "bfloat16")
    for value in graph.graph.initializers.values():
        array = (
            value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy()) if value.const_value is not None else None
        )
        value.const_value, value.type = ir.tensor(array, name=value.name), ir.TensorType(ir.DataType.BFLOAT16)
    report = proof.prove(attention.fuse, graph, [feeds(graph)])
    assert report.proof is not None
    assert (report.fused, report.proof.held, report.proof.unproved) == (2, 2, ())


BROKEN = "decoder.block.1.layer.0.layer_norm/"


@pytest.fixture
def wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(norm: Any, name: str) -> None:
        wrong = (norm.last.name or "").startswith(BROKEN)
        rewrite(type(norm)(**{**vars(norm), "epsilon": 0.5}) if wrong else norm, name)

    rewrite = rms_norm._rewrite
    monkeypatch.setattr(rms_norm, "_rewrite", broken)


@pytest.mark.usefixtures("wrong_norm")
def test_an_export_keeps_what_holds_and_is_verified(checkpoints: Make, tmp_path: Path) -> None:
    artifact = pipeline.export(checkpoints("t5"), tmp_path / "out", prove=True)
    patterns = artifact.manifest.fusion["decoder"]["patterns"]
    (refusal,) = patterns["RMSNormalization"]["refused"]
    assert refusal.startswith(f"{BROKEN}Pow_")
    assert "fused, but it does not hold" in refusal
    assert (patterns["RMSNormalization"]["fused"], patterns["RMSNormalization"]["proof"]["held"]) == (6, 6)
    assert artifact.manifest.fusion["encoder"]["patterns"]["RMSNormalization"]["refused"] == []
    assert all(report["proof"]["unproved"] == [] for report in patterns.values())
    assert verify(artifact.path).passed
    assert Artifact.open(artifact.path).manifest.fusion == artifact.manifest.fusion
    document, text = of_artifact(artifact)
    assert document["fusion"]["decoder"]["patterns"] == patterns
    assert f"      {refusal}\n      6 of 6 proved alone: largest error " in text


@pytest.mark.parametrize("name", ["whisper", "gpt2", "bert"])
def test_every_rewrite_of_every_kind_of_model_is_proved(name: str, checkpoints: Make, tmp_path: Path) -> None:
    fusion = pipeline.export(checkpoints(name), tmp_path / "out", prove=True).manifest.fusion
    reports = [report for graph in fusion.values() for report in graph["patterns"].values()]
    assert sum(report["fused"] for report in reports) > 0
    for report in reports:
        assert (report["proof"]["held"], report["proof"]["unproved"]) == (report["fused"], [])
        assert not any("does not hold" in reason for reason in report["refused"])


def test_packed_projections_that_are_joined_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Make, tmp_path: Path
) -> None:
    joined = qkv._side_by_side

    def swapped(graph: Any, values: Sequence[Any], widths: Sequence[int], packed: Any) -> Any:
        first = str(values[0].name) if values[0] is not None else ""
        return joined(graph, values[::-1] if ".1." in first else values, widths, packed)

    monkeypatch.setattr(qkv, "_side_by_side", swapped)
    fusion = pipeline.export(checkpoints("bart"), tmp_path / "out", prove=True).manifest.fusion
    for graph in ("encoder", "decoder"):
        report = fusion[graph]["patterns"]["QKV"]
        (refusal,) = report["refused"]
        assert f"{graph}.layers.1." in refusal
        assert (report["fused"], report["proof"]["held"]) == (1, 1)


@pytest.mark.usefixtures("wrong_scale")
def test_a_foreign_file_keeps_what_holds_and_is_verified(tmp_path: Path) -> None:
    onnx.save(ir.to_proto(model(TWO)), tmp_path / "in.onnx")
    (tmp_path / "out").mkdir()
    found = foreign_child.optimize(tmp_path / "in.onnx", tmp_path / "out", lambda stage: None, prove=True)
    (refusal,) = found["fusions"]["Attention"]["refused"]
    assert refusal.startswith(f"{SECOND}: fused, but it does not hold: ")
    assert found["operators"]["Attention"] == 1
    assert found["parity"]["largest_error"] <= found["parity"]["tolerance"]
    document = json.loads(json.dumps({**found, "path": "out", "source": "in.onnx", "files": {}}))
    assert f"    {refusal}\n    1 of 1 proved alone: largest error " in of_optimized(document)
