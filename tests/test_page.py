"""The page of ``txopt inspect --html``: what it shows, that nothing in it can run or load, and what it never overwrites."""

import html.parser
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.test_cli import txopt, txopt_without
from txopt.exporter import foreign
from txopt.inspection import inspect
from txopt.page import content, file
from txopt.page.kinds import KINDS, kind_of
from txopt.page.render import render
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import SourceError, UsageError

EVIL = "<script>alert(1)</script>"
GELU = "a = Div(x, root) t = Erf(a) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)"


class Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text without styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def save(folder: Path, nodes: str = GELU, name: str = "in.onnx", *, evil: bool = False) -> Path:
    text = f'<ir_version: 8, opset_import: ["" : 13]> net (float[N,4] x) => (float[N,4] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for weight, number in (("root", 2**0.5), ("one", 1.0), ("half", 0.5)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), weight))
    for node in model.graph.node:
        node.name = EVIL if evil else f"/encoder/layers.0/{node.op_type}"
    if evil:
        model.producer_name = EVIL
        big = numpy_helper.from_array(np.ones(400, np.float32), f"'\"><img src=x onerror=alert(2)>{EVIL}")
        model.graph.initializer.append(big)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = EVIL
    onnx.save(model, folder / name)
    return folder / name


def page_of(model: Path, folder: Path) -> tuple[str, Reader]:
    inspect(model, html=folder / "page.html")
    page = (folder / "page.html").read_text("utf-8")
    return page, Reader(page)


def test_the_layers_are_side_by_side_before_and_after(tmp_path: Path) -> None:
    _, read = page_of(save(tmp_path), tmp_path)
    blocks = [attributes for tag, attributes in read.tags if tag == "i" and "title" in attributes]
    titles = [str(attributes["title"]) for attributes in blocks]
    assert [title.partition(" – ")[0] for title in titles] == ["Div", "Erf", "Add", "Mul", "Mul", "Gelu"]
    assert titles[1] == "Erf – /encoder/layers.0/Erf"
    assert [attributes["class"] for attributes in blocks][1::4] == ["activation", "activation"]
    assert "encoder.0" in read.text
    assert "5 → 1" in read.text
    assert read.open == []


def test_refusals_are_listed_once_for_each_reason(tmp_path: Path) -> None:
    model = save(tmp_path, GELU.replace("y = Mul(h, s)", "g = Mul(h, s) y = Add(g, s)"))
    _, read = page_of(model, tmp_path)
    assert re.search(
        r"1 × its product is not x/2 times the sum with 1\s*/encoder/layers\.0/Erf", " ".join(read.text.split())
    )
    many = content.of_onnx(*_with_refusals([f"node{index}: the same" for index in range(40)] + ["other: another"]))
    (row,) = many["fusions"][0]["rows"]
    assert [(reason["reason"], reason["nodes"], reason["more"]) for reason in row["reasons"]] == [
        ("the same", 40, 28),
        ("another", 1, 0),
    ]


def _with_refusals(refused: list[str]) -> tuple[dict[str, object], dict[str, object]]:
    rows = [{"layer": "encoder.0", "nodes": 1, "operators": [["Relu", "r"]]}]
    document = {"path": "in.onnx", "bytes": 1, "external_data": [], "parameters": 0, "opset": 13, "producer": ""}
    document |= {"problem": None, "fusions": {"Gelu": {"fused": 0, "refused": refused}}, "inputs": [], "outputs": []}
    weights = {"groups": [], "largest": [], "all": 0}
    return document, {"graphs": {"": {"before": rows, "after": rows}}, "layers": [], "weights": weights}


@pytest.mark.parametrize("nodes", [GELU, GELU.replace("y = Mul(h, s)", "g = Mul(h, s) y = Add(g, s)")])
def test_what_a_foreign_file_says_is_text_and_nothing_else(nodes: str, tmp_path: Path) -> None:
    page, read = page_of(save(tmp_path, nodes, f"{EVIL[:8]}.onnx", evil=True), tmp_path)
    assert "alert(1)" in page
    assert not re.search(r"<\s*(script|img|iframe|link|object|base)", page, re.IGNORECASE)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "img", "iframe", "link", "object", "base", "a"})
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith(("on", "href", "src"))]
    assert any(EVIL in str(attributes.get("title")) for _, attributes in read.tags)


def test_the_page_loads_nothing_and_forbids_scripts(tmp_path: Path) -> None:
    page, read = page_of(save(tmp_path), tmp_path)
    policies = [
        attributes["content"]
        for tag, attributes in read.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not re.search(r"url\(|@import|https?://", page)


def test_a_file_that_cannot_be_optimized_is_shown_as_it_is(tmp_path: Path) -> None:
    model = save(tmp_path, "y = com.microsoft.FastGelu(x)")
    _, read = page_of(model, tmp_path)
    assert "com.microsoft::FastGelu" in read.text
    assert "before fusing" in read.text
    assert "after fusing" not in read.text
    assert "What fusing would make of it cannot be told." in read.text


def test_an_artifact_is_shown_as_stored_with_its_certificate(g2p: Artifact, tmp_path: Path) -> None:
    document, text = inspect(g2p.path, html=tmp_path / "page.html")
    read = Reader((tmp_path / "page.html").read_text("utf-8"))
    assert document["html"] == str(tmp_path / "page.html")
    assert text.endswith(f"\n  page: {tmp_path / 'page.html'}")
    for said in ("verified against PyTorch", "What they were before is not kept", "encoder.0", "decoder.1", "logits"):
        assert said in read.text
    assert "before fusing" not in read.text
    assert Artifact.open(g2p.path)


def test_the_shares_of_an_artifact_count_a_shared_weight_once(g2p: Artifact) -> None:
    manifest = g2p.manifest
    picture = foreign.stored(g2p.path, {name: graph.file for name, graph in manifest.graphs.items()})
    held = sum(layer["bytes"] for layer in picture["layers"])
    assert 0.9 * manifest.files["weights.data"].size < held
    assert held < 1.1 * manifest.files["weights.data"].size


def test_a_graph_of_thousands_of_nodes_stays_a_page(tmp_path: Path) -> None:
    names = [f"v{index}" for index in range(6000)]
    nodes = " ".join(f"{new} = Neg({old})" for old, new in zip(["x", *names], [*names, "y"], strict=True))
    page, read = page_of(save(tmp_path, nodes), tmp_path)
    assert "and 5,001 more" in read.text
    assert len(page) < 500_000


def test_every_kind_of_operator_is_told_apart() -> None:
    operators = ["Attention", "Gemm", "RMSNormalization", "Gelu", "TensorScatter", "QuantizeLinear", "Add", "Reshape"]
    assert [kind_of(operator) for operator in [*operators, "NoSuchThing"]] == [*KINDS]
    assert kind_of("com.microsoft::FastGelu") == "activation"


# The file


def test_a_page_is_replaced_only_where_asked(tmp_path: Path) -> None:
    model, target = save(tmp_path), tmp_path / "page.html"
    inspect(model, html=target)
    before = target.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        inspect(model, html=target)
    target.write_bytes(before + b"<!-- an older page -->")
    inspect(model, html=target, overwrite=True)
    assert target.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.onnx", "page.html"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_page_is_never_overwritten(overwrite: bool, tmp_path: Path) -> None:
    model = save(tmp_path)
    other, link, folder = tmp_path / "notes.html", tmp_path / "link.html", tmp_path / "folder"
    other.write_text("<!doctype html>\nmine")
    page = tmp_path / "real.html"
    page.write_bytes(file.MARK)
    link.symlink_to(page)
    folder.mkdir()
    for target in (other, link, folder, model):
        content_before = target.read_bytes() if target.is_file() else None
        with pytest.raises(UsageError, match="never overwritten"):
            inspect(model, html=target, overwrite=overwrite)
        assert (target.read_bytes() if target.is_file() else None) == content_before


def test_a_page_is_not_written_into_the_artifact(g2p: Artifact) -> None:
    for model in (g2p.path, g2p.path / "encoder.onnx"):
        with pytest.raises(UsageError, match="is inside the artifact"):
            inspect(model, html=g2p.path / "page.html")
    assert Artifact.open(g2p.path)


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make it first"):
        inspect(save(tmp_path), html=tmp_path / "no/page.html")


def test_overwrite_needs_a_page(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--html"):
        inspect(save(tmp_path), overwrite=True)


def test_what_appears_meanwhile_is_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(UsageError, match="meanwhile"):
        file.write(target, "page", overwrite=True)
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_file_that_is_no_graph_leaves_no_page(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(b"no graph at all")
    with pytest.raises(SourceError):
        inspect(tmp_path / "in.onnx", html=tmp_path / "page.html")
    assert os.listdir(tmp_path) == ["in.onnx"]


def test_a_name_that_utf_8_cannot_hold_does_not_end_in_a_traceback(tmp_path: Path) -> None:
    document, picture = _with_refusals([])
    page = render(content.of_onnx({**document, "path": "\udcff.onnx"}, picture))
    file.write(tmp_path / "page.html", page, overwrite=False)
    assert "?.onnx" in (tmp_path / "page.html").read_text("utf-8")


def test_4_a_missing_package_is_named(g2p: Artifact, tmp_path: Path) -> None:
    done = txopt_without("jinja2", "inspect", g2p.path, "--html", tmp_path / "page.html")
    assert (done.returncode, done.stdout) == (4, "")
    assert "jinja2" in done.stderr
    assert os.listdir(tmp_path) == []


def test_0_the_command_writes_a_page_and_one_document(tmp_path: Path) -> None:
    save(tmp_path)
    done = txopt("inspect", "in.onnx", "--html", "page.html", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["html"] == "page.html"
    assert document["layers"] == [{"name": "encoder.0", "nodes": 5, "parameters": 3, "bytes": 12}]
    assert (tmp_path / "page.html").read_bytes().startswith(file.MARK)
    again = txopt("inspect", "in.onnx", "--html", "page.html", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--overwrite" in again.stderr
