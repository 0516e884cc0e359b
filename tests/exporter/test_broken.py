"""Exports broken on purpose: each is refused, said where, and leaves nothing behind. A gate that passes these proves nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from txopt.exporter import pipeline
from txopt.exporter.source import Source
from txopt.exporter.trace import Trace
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, ParityError
from txopt.runtime.parity import Deviation, replay

Artifacts = Callable[[str], Artifact]
Make = Callable[[str], Path]
Edit = Callable[[dict[str, ir.Model]], None]

DECODER = "model.decoder.layers"


def weight(graph: str, name: str, change: float = 0.5) -> Edit:
    """One element of one weight, changed."""

    def edit(graphs: dict[str, ir.Model]) -> None:
        value = graphs[graph].graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[0, 0] += change
        value.const_value = ir.tensor(array, name=name)

    return edit


def mask(name: str, operator: str) -> Edit:
    """The mask that node ``name`` makes: "Or" lets everything through, "Not" inverts it."""

    def edit(graphs: dict[str, ir.Model]) -> None:
        made = node(graphs["decoder"], name)
        old = made.outputs[0]
        users = list(old.uses())
        inverse = ir.node("Not", [old])
        added = [inverse] if operator == "Not" else [inverse, ir.node("Or", [old, inverse.outputs[0]])]
        graphs["decoder"].graph.insert_after(made, added)
        for user, index in users:
            user.replace_input_with(index, added[-1].outputs[0])

    return edit


def off_by_one(name: str, index: int, *operators: str) -> Edit:
    """What node ``name`` of the decoder takes as its input ``index``, with one applied by ``operators`` in turn."""

    def edit(graphs: dict[str, ir.Model]) -> None:
        user = node(graphs["decoder"], name)
        one = ir.node("Constant", [], attributes={"value_int": 1})
        graphs["decoder"].graph.insert_before(user, [one])
        for operator in operators:
            changed = ir.node(operator, [user.inputs[index], one.outputs[0]])
            graphs["decoder"].graph.insert_before(user, [changed])
            user.replace_input_with(index, changed.outputs[0])

    return edit


def scale(name: str) -> Edit:
    def edit(graphs: dict[str, ir.Model]) -> None:
        attention = node(graphs["decoder"], name)
        attention.attributes["scale"] = ir.AttrFloat32("scale", attention.attributes["scale"].as_float() * 1.1)

    return edit


def swap_cross(graphs: dict[str, ir.Model]) -> None:
    """The decoder's layers read each other's source K and V."""
    for kind, index in (("key", 1), ("value", 2)):
        values = {item.name: item for item in graphs["decoder"].graph.inputs}
        for layer in (0, 1):
            attention = node(graphs["decoder"], f"{DECODER}.{layer}.encoder_attn/Attention")
            attention.replace_input_with(index, values[f"cross_{kind}.{1 - layer}"])


def swap_cross_in_encoder(graphs: dict[str, ir.Model]) -> None:
    """The encoder hands out one layer's source values under the other's name."""
    outputs = {item.name: item for item in graphs["encoder"].graph.outputs}
    outputs["cross_value.0"].name, outputs["cross_value.1"].name = "cross_value.1", "cross_value.0"


def node(model: ir.Model, name: str) -> ir.Node:
    """The first node whose name begins so: numbers at the end of names belong to the exporter."""
    return next(found for found in model.graph if found.name is not None and found.name.startswith(name))


KEYS = f"{DECODER}.1.self_attn.k_proj.weight.T"

# what is broken, how, and where the message must say that the artifact left PyTorch's path
BREAKS: dict[str, tuple[Edit, str]] = {
    "weight of layer 1": (weight("decoder", KEYS), 'case "single": self_key of layer 1 at step 0'),
    "weight before layer 1": (
        weight("decoder", f"{DECODER}.0.fc1.weight.T"),
        'case "single": self_key of layer 1 at step 0',
    ),
    "weight of layer 0": (
        weight("decoder", f"{DECODER}.0.self_attn.v_proj.weight.T"),
        'case "single": self_value of layer 0 at step 0',
    ),
    "weight after all caches": (weight("decoder", f"{DECODER}.1.fc2.weight.T"), 'case "single": logits at step 0'),
    "weight of the encoder": (
        weight("encoder", "model.encoder.layers.0.fc1.weight.T"),
        'case "single": memory deviates',
    ),
    "weight of cross-attention": (
        weight("encoder", f"{DECODER}.1.encoder_attn.v_proj.weight.T"),
        'case "single": cross_value of layer 1 deviates',
    ),
    "weight that is NaN": (weight("decoder", KEYS, np.nan), "self_key of layer 1 at step 0 deviates by nan"),
    "causal mask dropped": (mask("LessOrEqual", "Or"), 'case "single": self_key of layer 1 at step 0'),
    "causal mask inverted": (mask("LessOrEqual", "Not"), 'case "single": self_key of layer 1 at step 0'),
    "causal mask off by one": (off_by_one("LessOrEqual", 1, "Add"), 'case "single": self_key of layer 1 at step 0'),
    "source mask dropped": (mask("Expand", "Or"), 'case "padded": self_key of layer 1 at step 0'),
    "source mask inverted": (mask("Expand", "Not"), 'case "single": self_key of layer 1 at step 0'),
    "position of embeddings off by one": (
        off_by_one("model.decoder.embed_positions/Add", 0, "Add"),
        'case "single": self_key of layer 0 at step 0',
    ),
    "position of writing off by one": (
        off_by_one(f"{DECODER}.1.self_attn/TensorScatter", 2, "Max", "Sub"),  # engines refuse to write past the ends
        'case "single": self_key of layer 1 at step 0',
    ),
    "scale of cross-attention": (
        scale(f"{DECODER}.0.encoder_attn/Attention"),
        'case "single": self_key of layer 1 at step 0',
    ),
    # The first token attends to itself alone, whatever the scale is; of the steps after it only the logits are kept.
    "scale of self-attention": (scale(f"{DECODER}.0.self_attn/Attention"), 'case "single": logits at step 1'),
    "source K and V swapped in the decoder": (swap_cross, 'case "single": self_key of layer 1 at step 0'),
    "source V swapped in the encoder": (swap_cross_in_encoder, 'case "single": cross_value of layer 0 deviates'),
}


@pytest.fixture(scope="module")
def traced(checkpoints: Make) -> Trace:
    """The real trace, made once: what each test breaks is a copy of it."""
    opened = pipeline.checkpoint.load(checkpoints("bart"), torch.float32)
    return pipeline.trace(opened.source, torch.float32)


@pytest.fixture
def export_broken(
    traced: Trace, checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Edit], Artifact]:
    def export(edit: Edit, overwrite: bool = False) -> Artifact:
        graphs = {name: model.clone() for name, model in traced.graphs.items()}
        edit(graphs)

        def trace(source: Source, dtype: torch.dtype) -> Trace:
            return replace(traced, graphs=graphs)

        monkeypatch.setattr(pipeline, "trace", trace)
        return pipeline.export(checkpoints("bart"), tmp_path / "parent" / "out", overwrite=overwrite)

    return export


def test_the_copy_that_nothing_breaks_is_verified(export_broken: Callable[[Edit], Artifact]) -> None:
    assert export_broken(lambda graphs: None).manifest.parity["passed"]


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_export_is_refused_and_leaves_nothing(
    what: str, export_broken: Callable[[Edit], Artifact], tmp_path: Path
) -> None:
    edit, where = BREAKS[what]
    with pytest.raises(ParityError) as caught:
        export_broken(edit)
    first = next(line for line in str(caught.value).splitlines() if "first deviation" in line)
    assert where in first
    assert "allowed" in first
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir()), "the export made the parent too, so that has to go with it"


def test_a_broken_export_leaves_the_artifact_it_was_to_replace(
    export_broken: Callable[..., Artifact],
) -> None:
    good = export_broken(lambda graphs: None)
    with pytest.raises(ParityError):
        export_broken(swap_cross, overwrite=True)
    assert Artifact.open(good.path).manifest == good.manifest
    assert list(good.path.parent.iterdir()) == [good.path]


def test_weights_damaged_later_are_found_by_their_hash(artifacts: Artifacts, tmp_path: Path) -> None:
    whole = artifacts("bart")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in whole.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "weights.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "weights.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights\.data.*SHA-256"):
        Artifact.open(copy)


def test_an_answer_that_is_nan_is_a_failure(artifacts: Artifacts) -> None:
    assert not Deviation(case="c", tensor="t", error=float("nan"), tolerance=1.0).holds
    artifact = artifacts("bart")
    case = next(case for case in cases.load(artifact.path) if case.name == "single")
    logits = case.expected["logits"].copy()
    logits[0, 3, 5] = np.nan
    report = replay(artifact, [replace(case, expected={**case.expected, "logits": logits})])
    assert not report.passed
    with pytest.raises(ParityError, match="logits at step 3 deviates by nan"):
        report.require()


def test_wrong_ids_far_from_a_tie_are_a_failure(artifacts: Artifacts) -> None:
    artifact = artifacts("bart")
    case = next(case for case in cases.load(artifact.path) if case.name == "single")
    assert case.margins is not None
    ids = case.generated["greedy"].copy()
    sure = int(case.margins[0].argmax())
    ids[0, sure + 1] += 1
    report = replay(artifact, [replace(case, generated={"greedy": ids})])
    assert not report.passed
    with pytest.raises(
        ParityError, match=rf'case "single", greedy, row 0, token {sure + 1}: expected id .* no near-tie'
    ):
        report.require()


def test_a_difference_at_a_tie_is_told_and_allowed(artifacts: Artifacts) -> None:
    artifact = artifacts("bart")
    case = next(case for case in cases.load(artifact.path) if case.name == "single")
    assert case.margins is not None
    ids, margins = case.generated["greedy"].copy(), case.margins.copy()
    ids[0, 1] += 1
    margins[0, 0] = 1e-6
    report = replay(artifact, [replace(case, generated={"greedy": ids}, margins=margins)])
    assert report.passed
    assert len(report.near_ties) == 1
    assert report.ids == {"single/greedy": "0 of 1 rows equal"}
