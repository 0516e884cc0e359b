"""The operators of the trace: what they say in PyTorch, and that their ONNX nodes say the same on shapes that were not traced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from txopt.exporter.operators import OPSET, TRANSLATIONS, attention, cross_attention, fold_mask, kv_write

H, D = 3, 8
Tensors = tuple[Tensor, ...]

ROWS, SOURCES = Dim("R", min=1, max=1024), Dim("B", min=1, max=1024)
QUERIES, CACHE, LENGTH = Dim("Q", min=1, max=1024), Dim("S", min=1, max=1024), Dim("T", min=1, max=1024)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The definition, in float64."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * scale
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double()).to(q.dtype)


def writes(rows: int, queries: int, cache: int) -> Tensors:
    position = torch.arange(rows) * 2 % (cache - queries + 1)
    return torch.randn(rows, H, cache, D), torch.randn(rows, H, queries, D), position


def attends(rows: int, queries: int, cache: int) -> Tensors:
    mask = torch.arange(cache) <= (torch.arange(rows)[:, None] + torch.arange(queries))[:, None, :, None]
    return torch.randn(rows, H, queries, D), torch.randn(rows, H, cache, D), torch.randn(rows, H, cache, D), mask


def crosses(sources: int, beams: int, queries: int, length: int) -> Tensors:
    """q, k, v, the folded mask, and with it the source mask it was folded from."""
    tokens = torch.zeros(sources * beams, queries, dtype=torch.int64)
    source = (torch.arange(length) < length - torch.arange(sources)[:, None] % length).long()
    k, v = torch.randn(sources, H, length, D), torch.randn(sources, H, length, D)
    return torch.randn(sources * beams, H, queries, D), k, v, fold_mask(source, tokens), source


def test_every_row_is_written_at_its_own_position() -> None:
    buffer, new, _ = writes(3, 2, 9)
    position = torch.tensor([0, 4, 7])
    expected = buffer.clone()
    for row, start in enumerate(position.tolist()):
        expected[row, :, start : start + 2] = new[row]
    before = buffer.clone()
    assert torch.equal(kv_write(buffer, new, position), expected)
    assert torch.equal(buffer, before), "the operator must not write into its input"


def test_attention_is_its_definition() -> None:
    q, k, v, mask = attends(3, 4, 9)
    torch.testing.assert_close(attention(q, k, v, mask, 0.3), softmax_attention(q, k, v, mask, 0.3))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention(q, k, v, additive, 0.3), softmax_attention(q, k, v, mask, 0.3))
    everything = torch.ones(1, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v, None, 0.3), softmax_attention(q, k, v, everything, 0.3))


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("queries", [1, 4])
def test_folding_rows_equals_repeating_keys_and_values(beams: int, queries: int) -> None:
    q, k, v, folded, source = crosses(3, beams, queries, 6)
    repeated = (x.repeat_interleave(beams, 0) for x in (k, v))
    mask = source.bool().repeat_interleave(beams, 0)[:, None, None, :]
    torch.testing.assert_close(cross_attention(q, k, v, folded, 0.5), softmax_attention(q, *repeated, mask, 0.5))


def test_a_folded_mask_is_the_source_mask_for_every_query_of_every_beam() -> None:
    source = torch.tensor([[1, 1, 1], [1, 0, 0]])
    folded = fold_mask(source, torch.zeros(6, 4, dtype=torch.int64))  # 2 sources, 3 beams, 4 queries
    assert folded.dtype == torch.bool
    assert folded.shape == (2, 1, 12, 3)
    assert torch.equal(folded, source.bool()[:, None, None, :].expand(2, 1, 12, 3))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (kv_write, writes(3, 2, 9)),
        (attention, (*attends(3, 4, 9), 0.3)),
        (attention, (*attends(3, 4, 9)[:3], None, 0.3)),
        (cross_attention, (*crosses(2, 3, 4, 5)[:4], 0.3)),
        (fold_mask, (torch.ones(2, 5, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.int64))),
    ],
    ids=["kv_write", "attention", "attention without mask", "cross_attention", "fold_mask"],
)
def test_shapes_and_dtypes_under_trace_are_the_real_ones(operator: Callable[..., Tensor], arguments: Any) -> None:
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Alone(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


# how to call it, inputs by their sizes, the sizes traced and others, dynamic axes, the nodes that must be there once
EXPORTS: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensors], list[tuple[int, ...]], tuple[Any, ...], str]
] = {
    "kv_write": (
        kv_write,
        writes,
        [(6, 3, 11), (1, 1, 4), (5, 4, 4)],
        ({0: ROWS, 2: CACHE}, {0: ROWS, 2: QUERIES}, {0: ROWS}),
        "TensorScatter",
    ),
    "attention": (
        lambda q, k, v, mask: attention(q, k, v, mask, 0.3),
        attends,
        [(6, 3, 11), (1, 1, 5), (2, 7, 9)],
        ({0: ROWS, 2: QUERIES}, {0: ROWS, 2: CACHE}, {0: ROWS, 2: CACHE}, {0: ROWS, 2: QUERIES, 3: CACHE}),
        "Attention",
    ),
    "attention without mask": (
        lambda q, k, v: attention(q, k, v, None, 0.3),
        lambda *sizes: attends(*sizes)[:3],
        [(6, 3, 11), (1, 1, 5)],
        ({0: ROWS, 2: QUERIES}, {0: ROWS, 2: CACHE}, {0: ROWS, 2: CACHE}),
        "Attention",
    ),
    "cross_attention": (
        lambda q, k, v, source, tokens: cross_attention(q, k, v, fold_mask(source, tokens), 0.3),
        lambda *sizes: (
            *crosses(*sizes)[:3],
            crosses(*sizes)[4],
            torch.zeros(sizes[0] * sizes[1], sizes[2], dtype=torch.int64),
        ),
        [(2, 3, 4, 7), (1, 1, 1, 5), (3, 1, 2, 6), (2, 4, 1, 1)],
        (
            {0: ROWS, 2: QUERIES},
            {0: SOURCES, 2: LENGTH},
            {0: SOURCES, 2: LENGTH},
            {0: SOURCES, 1: LENGTH},
            {0: ROWS, 1: QUERIES},
        ),
        "Attention",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTS)
def test_exported_alone_it_says_what_pytorch_says(name: str, tmp_path: Path) -> None:
    call, make, sizes, axes, operator = EXPORTS[name]
    module, example = Alone(call), make(*sizes[0])
    path = tmp_path / "alone.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(axes,),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node].count(operator) == 1
    assert {entry.domain for entry in model.opset_import} == {""}
    session = onnxruntime.InferenceSession(path)
    names = [item.name for item in session.get_inputs()]
    for size in sizes:
        inputs = make(*size)
        (got,) = session.run(None, {key: value.numpy() for key, value in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(got), call(*inputs), rtol=0, atol=1e-5)
