"""Attention within windows: what is it becomes one operator over blocks, whatever the length; what is nearly it says why it stays."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.exporter import windowed
from tests.exporter.plain_engine import run, scale_attention
from tests.exporter.windowed import HEADS, SIZE, export, prepared
from txopt.exporter import foreign
from txopt.exporter.fusion import windows
from txopt.exporter.graph import count

pytestmark = pytest.mark.filterwarnings("ignore")  # the old exporter warns of itself

PLACES = "its scores do not stand where a window has them: 2 x 8 tokens, error"

# module, what it is exported with (window, batch, tokens), and the (batch, windows) that its file takes
SPELLINGS: dict[str, tuple[type[windowed.Windows], tuple[int, int, int], tuple[tuple[int, int], ...]]] = {
    "several windows": (windowed.Windows, (8, 2, 16), ((2, 2), (2, 3), (3, 5))),
    "one window": (windowed.Windows, (8, 1, 8), ((1, 1), (1, 4), (2, 3))),
    "a window that is no power of two": (windowed.Windows, (6, 2, 12), ((2, 2), (3, 3))),
    "tokens first": (windowed.TokensFirst, (8, 2, 16), ((2, 2), (3, 3))),
    "nothing hidden": (windowed.NothingHidden, (8, 2, 16), ((2, 2), (3, 3))),
}

# module, and how the reason begins
NEAR_MISSES: dict[str, tuple[type[windowed.Windows], str]] = {
    "tokens beyond the ends": (windowed.OpenEnds, PLACES),
    "a mask that counts twice": (windowed.Doubled, "multiplies its mask by what are no ones"),
    "the other way round": (windowed.Backward, PLACES),
    "scaled after the mask": (windowed.Scaled, "does more than move its scores"),
    "a number of each query's own": (windowed.Biased, "does more than move its scores"),
    "global tokens": (windowed.WithGlobal, "does more than move its scores"),
    "no mask": (windowed.Unmasked, "no mask is cut into chunks as its scores are"),
    "halves for hidden tokens": (windowed.HalfHidden, "does more than move its probabilities"),
    "softmaxed over heads": (windowed.AcrossHeads, "does more than move its scores"),
    "probabilities shown": (windowed.Shown, "is read elsewhere too"),
}


def feeds(batch: int, tokens: int) -> dict[str, np.ndarray]:
    """Padding is scattered: a window that hides all of its tokens has no meaning, and chunks may be cut from other rows."""
    random = np.random.default_rng(batch * tokens)
    keep = (np.arange(tokens) % 5 != np.arange(batch)[:, None] % 5).astype(np.float32)
    return {"x": random.normal(size=(batch, tokens, HEADS * SIZE)).astype(np.float32), "keep": keep}


@pytest.mark.parametrize("name", SPELLINGS)
def test_windows_become_attention_over_blocks(name: str, tmp_path: Path) -> None:
    module, (window, batch, tokens), sizes = SPELLINGS[name]
    torch.manual_seed(0)
    before = prepared(export(module(window), tmp_path / "in.onnx", batch=batch, tokens=tokens))
    after, broken = before.clone(), before.clone()
    report = windows.fuse(after)
    assert (report.fused, report.refused) == (1, [])
    assert count(after)["Attention"] == 1
    assert not {"Softmax", "ScatterND"} & count(after).keys()
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    windows.fuse(broken)
    scale_attention(broken, 1.1)
    for rows, several in sizes:
        given = feeds(rows, several * window)
        expected = run(before, given)[0]
        np.testing.assert_allclose(run(after, given)[0], expected, rtol=0, atol=1e-5)
        assert np.abs(run(broken, given)[0] - expected).max() > 1e-3


def test_what_a_file_says_is_kept_where_it_is_not_what_its_module_says(tmp_path: Path) -> None:
    """The old exporter writes strides as numbers, and cuts chunks by them from a tensor that lies otherwise in memory."""
    torch.manual_seed(0)
    module, given = windowed.TokensFirst(), feeds(2, 16)
    before = prepared(export(module, tmp_path / "in.onnx"))
    after = before.clone()
    assert windows.fuse(after).fused == 1
    with torch.no_grad():
        said = module(*map(torch.from_numpy, given.values())).numpy()
    written = run(before, given)[0]
    assert np.abs(written - said).max() > 0.1
    np.testing.assert_allclose(run(after, given)[0], written, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone(name: str, tmp_path: Path) -> None:
    module, reason = NEAR_MISSES[name]
    torch.manual_seed(0)
    graph = prepared(export(module(), tmp_path / "in.onnx"))
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = windows.fuse(graph)
    assert report.fused == 0
    assert [reason in refusal for refusal in report.refused] == [True]
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


def test_scores_that_are_multiplied_where_they_are_put_are_left_alone(tmp_path: Path) -> None:
    graph = prepared(export(windowed.Windows(), tmp_path / "in.onnx"))
    scatter = next(node for node in graph.graph if node.op_type == "ScatterND")
    scatter.attributes["reduction"] = ir.AttrString("reduction", "mul")
    report = windows.fuse(graph)
    assert report.refused == [f"/Einsum/MatMul_1: {scatter.name} does more than move its scores"]


def test_what_was_tried_and_refused_leaves_no_reader_behind(tmp_path: Path) -> None:
    graph = prepared(export(windowed.OpenEnds(), tmp_path / "in.onnx"))
    windows.fuse(graph)
    values = [value for node in graph.graph for value in node.outputs]
    assert all(user.graph is graph.graph for value in values for user, _ in value.uses())


def test_fixed_lengths_fuse_too(tmp_path: Path) -> None:
    before = prepared(export(windowed.Windows(), tmp_path / "in.onnx", fixed=True))
    after = before.clone()
    assert windows.fuse(after).fused == 1
    given = feeds(2, 16)
    np.testing.assert_allclose(run(after, given)[0], run(before, given)[0], rtol=0, atol=1e-5)


def test_masks_are_as_wide_as_a_block_and_its_neighbours(tmp_path: Path) -> None:
    """So memory grows with the length and not with its square."""
    graph = prepared(export(windowed.Windows(8), tmp_path / "in.onnx"))
    windows.fuse(graph)
    (attention,) = (node for node in graph.graph if node.op_type == "Attention")
    graph.graph.outputs.append(attention.inputs[3])
    for tokens in (16, 64):
        assert run(graph, feeds(2, tokens))[1].shape == (2 * HEADS, tokens // 4, 4, 12)


def test_it_is_proved_alone_and_in_the_whole_file(tmp_path: Path) -> None:
    report = foreign.optimize(export(windowed.Windows(), tmp_path / "in.onnx"), tmp_path / "out", prove=True)
    assert report.operators["Attention"] == 1
    proof = report.fusions["Attention.windows"]["proof"]
    assert (proof["held"], proof["unproved"]) == (1, [])
    assert proof["largest_error"] < 1e-5
    assert report.parity["largest_error"] < 1e-5
