"""The four operators of the trace, and the ONNX nodes each becomes.

A model under trace calls these instead of its own attention and cache code, so that fused nodes arrive by construction:
nothing has to be found again in the finished graph. They run in PyTorch too, which is how the trace is tested.
Axes: B sources, R rows (B times the number of beams, beams of a source adjacent), Q query tokens, S self-cache length,
T source length, H heads, D head size. The operators know no model.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import ir, values
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

OPSET = 24
_op = values.Opset("", OPSET)


@torch.library.custom_op("txopt::kv_write", mutates_args=())
def kv_write(buffer: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """buffer [R,H,S,D] with new [R,H,Q,D] written into every row r at position[r] (int64 [R])."""
    index = position[:, None, None, None] + torch.arange(new.shape[2])[None, None, :, None]
    return buffer.scatter(2, index.expand(new.shape), new)


@kv_write.register_fake
def _(buffer: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(buffer)


@torch.library.custom_op("txopt::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v; q [R,H,Q,D], k and v [R,H,S,D], mask boolean or additive, broadcast to [R,H,Q,S]."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("txopt::cross_attention", mutates_args=())
def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of q [R,H,Q,D] over k, v [B,H,T,D]: beams share their source's K and V, which are never repeated.

    Rows fold into the query axis, [B*K,H,Q,D] as [B,H,K*Q,D]; mask is boolean [B,1,K*Q,T] (see ``fold_mask``).
    """
    rows, heads, queries, size = q.shape
    folded = q.transpose(1, 2).reshape(k.shape[0], -1, heads, size).transpose(1, 2)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(rows, queries, heads, size).transpose(1, 2).contiguous()


@cross_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("txopt::fold_mask", mutates_args=())
def fold_mask(source: Tensor, tokens: Tensor) -> Tensor:
    """int64 [B,T] source mask to the boolean [B,1,K*Q,T] that folded queries of tokens [R,Q] need."""
    queries = tokens.numel() // source.shape[0]
    return source.bool()[:, None, None, :].repeat(1, 1, queries, 1)


@fold_mask.register_fake
def _(source: Tensor, tokens: Tensor) -> Tensor:
    queries = tokens.shape[0] * tokens.shape[1] // source.shape[0]
    return source.new_empty((source.shape[0], 1, queries, source.shape[1]), dtype=torch.bool)


def _ints(*numbers: int) -> ir.Value:
    return _op.Constant(value_ints=list(numbers))


def _to_tensor_scatter(buffer: ir.Value, new: ir.Value, position: ir.Value) -> ir.Value:
    return _op.TensorScatter(buffer, new, position, axis=2)


def _to_attention(q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float) -> ir.Value:
    # Only the first output may leave: TensorRT refuses Attention nodes with more.
    outputs = _op.Attention(q, k, v, scale=scale) if mask is None else _op.Attention(q, k, v, mask, scale=scale)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _to_cross_attention(q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float) -> ir.Value:
    by_token = _op.Transpose(
        q, perm=[0, 2, 1, 3]
    )  # [R,Q,H,D]: rows of one source are adjacent, so folding is a reshape
    heads_size = _op.Shape(q, start=1, end=2), _op.Shape(q, start=3, end=4)
    shape = _op.Concat(_op.Shape(k, start=0, end=1), _ints(-1), *heads_size, axis=0)
    folded = _op.Transpose(_op.Reshape(by_token, shape, allowzero=1), perm=[0, 2, 1, 3])
    out = _op.Transpose(_to_attention(folded, k, v, mask, scale), perm=[0, 2, 1, 3])
    return _op.Transpose(_op.Reshape(out, _op.Shape(by_token), allowzero=1), perm=[0, 2, 1, 3])


def _to_fold_mask(source: ir.Value, tokens: ir.Value) -> ir.Value:
    batch = _op.Shape(source, start=0, end=1)
    queries = _op.Div(_op.Reshape(_op.Size(tokens), _ints(1)), batch)
    shape = _op.Concat(batch, _ints(1), queries, _op.Shape(source, start=1, end=2), axis=0)
    return _op.Expand(_op.Unsqueeze(_op.Cast(source, to=ir.DataType.BOOL), _ints(1, 2)), shape)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.txopt.kv_write.default: _to_tensor_scatter,
    torch.ops.txopt.attention.default: _to_attention,
    torch.ops.txopt.cross_attention.default: _to_cross_attention,
    torch.ops.txopt.fold_mask.default: _to_fold_mask,
}
