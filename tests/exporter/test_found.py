"""Verification of what a decoder finds in its logits itself: searches read that, so it must be what is in them."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from txopt.exporter import weights
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ParityError
from txopt.runtime.parity import ParityReport, verify
from txopt.runtime.writer import ArtifactWriter

SOURCE = "txopt.examples.g2p.model:factory"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(SOURCE, tmp_path_factory.mktemp("cuda") / "out", target="cuda")


def changed(artifact: Artifact, out: Path, change: Callable[[ir.Graph], None]) -> Path:
    """A copy of ``artifact`` whose decoder says something else, and whose manifest vouches for it."""
    with ArtifactWriter(out) as writer:
        models = {name: ir.load(artifact.file(spec.file)) for name, spec in artifact.manifest.graphs.items()}
        change(models["decoder"].graph)
        weights.write(models, writer.directory)
        for name in artifact.manifest.files:
            if not (writer.directory / name).exists():
                (writer.directory / name).write_bytes(artifact.file(name).read_bytes())
        writer.commit(artifact.manifest)
    return out


def made_by(graph: ir.Graph, name: str) -> ir.Node:
    node = next(value for value in graph.outputs if value.name == name).producer()
    assert node is not None
    return node


def more(graph: ir.Graph, name: str) -> None:
    """Doubles an output of the graph."""
    node = made_by(graph, name)
    index, output = next((at, value) for at, value in enumerate(graph.outputs) if value.name == name)
    doubled = ir.node("Add", [output, output], name=f"{name}/doubled")
    output.name, doubled.outputs[0].name = f"{name}/before", name
    doubled.outputs[0].shape, doubled.outputs[0].type = output.shape, output.type
    graph.insert_after(node, doubled)
    graph.outputs[index] = doubled.outputs[0]


def test_what_is_found_is_compared(chosen: Artifact) -> None:
    report: ParityReport = verify(chosen.path)
    compared = {name.rpartition("/")[2] for name in report.certificate()["errors"]}
    assert {"next", "ranked"} <= compared
    assert chosen.manifest.parity["errors"].keys() == report.certificate()["errors"].keys()


@pytest.mark.parametrize("name", ["log_sum", "top_values"])
def test_wrong_scores_of_a_search_are_heard(name: str, chosen: Artifact, tmp_path: Path) -> None:
    """Ids come out right, and scores do not."""
    with pytest.raises(ParityError, match="ranked deviates by"):
        verify(changed(chosen, tmp_path / "out", lambda graph: more(graph, name)))


def test_the_least_token_is_heard(chosen: Artifact, tmp_path: Path) -> None:
    def turn(graph: ir.Graph) -> None:
        made_by(graph, "next").op_type = "ArgMin"

    with pytest.raises(ParityError, match="next deviates by"):
        verify(changed(chosen, tmp_path / "out", turn))
