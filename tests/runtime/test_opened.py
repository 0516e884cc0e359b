"""A graph that is not the one the manifest describes is refused when it is opened, not when it fails."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.artifacts import Document, edit, tensor
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.model import load
from txopt.runtime.opened import Opened, Tensor, mismatches

SPEC = GraphSpec(
    file="encoder.onnx",
    inputs=(tensor("input_ids", "int64", "B", "T"),),
    outputs=(tensor("memory", "float32", "B", "T", 8),),
)


def found(inputs: dict[str, Tensor] | None = None, outputs: dict[str, Tensor] | None = None) -> list[str]:
    opened = Opened(
        inputs={"input_ids": ("int64", ("B", "T"))} if inputs is None else inputs,
        outputs={"memory": ("float32", ("B", "T", 8))} if outputs is None else outputs,
    )
    return list(mismatches("encoder", SPEC, opened))


@pytest.mark.parametrize("shape", [("B", "T", 8), ("batch", "length", 8), ("B", None, None), ("B", "T", "width")])
def test_the_same_graph_is_taken_whatever_it_calls_its_lengths(shape: tuple[int | str | None, ...]) -> None:
    assert found(outputs={"memory": ("float32", shape)}) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "graphs.encoder.outputs: expected memory float32 [B,T,8] in 'encoder.onnx', found no such tensor"),
        ({"memory": ("float16", ("B", "T", 8))}, "found float16 [B,T,8]"),
        ({"memory": ("float32", ("B", "T", 9))}, "found float32 [B,T,9]"),
        ({"memory": ("float32", ("B", 7, 8))}, "found float32 [B,7,8]"),
        ({"memory": ("float32", ("T", "B", 8))}, "found float32 [T,B,8]"),
        ({"memory": ("float32", ("B", None))}, "found float32 [B,?]"),
        ({"memory": ("float32", ("B", "T", 8)), "more": ("bool", ())}, "found 'more' in the file alone"),
    ],
)
def test_another_graph_is_not(tensors: dict[str, Tensor], message: str) -> None:
    (problem,) = found(outputs=tensors)
    assert message in problem


def swap_files(document: Document) -> None:
    graphs = document["graphs"]
    graphs["encoder"]["file"], graphs["decoder"]["file"] = graphs["decoder"]["file"], graphs["encoder"]["file"]


def fewer_words(document: Document) -> None:
    next(out for out in document["graphs"]["decoder"]["outputs"] if out["name"] == "logits")["axes"][2] = 50


def unmasked(document: Document) -> None:
    graph = document["graphs"]["decoder"]
    graph["inputs"] = [item for item in graph["inputs"] if item["name"] != "encoder_attention_mask"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_files, "expected memory float32 .* in 'decoder.onnx', found no such tensor"),
        (fewer_words, r"expected logits float32 \[R,Q,50\] in 'decoder.onnx', found float32 \[R,Q,73\]"),
        (unmasked, "found 'encoder_attention_mask' in the file alone"),
    ],
)
def test_a_manifest_of_other_graphs_is_refused(
    change: Callable[[Document], None], message: str, g2p: Artifact, tmp_path: Path
) -> None:
    """Sizes and hashes are right, and the manifest agrees with itself: only the graphs can tell."""
    shutil.copytree(g2p.path, tmp_path / "copy")
    edit(tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=message) as error:
        load(tmp_path / "copy", threads=1)
    assert "export it again" in str(error.value)
