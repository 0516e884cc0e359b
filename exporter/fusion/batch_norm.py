"""Layer norms as Keras 2 writes them: a batch norm that takes its statistics from what it is given, tokens in the place of channels.

    x -> Reshape [1,N,D,1] = r -> BatchNormalization(r, ones, zeros, mean, variance) -> Reshape as x -> Mul(weight) -> [Add(bias)]
    mean = ReduceMean(r, axes 0, 2 and 3), variance = ReduceSumSquare(r - mean, these axes) / D

That is TensorFlow's fused batch norm in training, as tf2onnx writes it; Keras 2 takes it for epsilons from 1.001e-5 on. layer_norm.py
puts in the operator; this file only says which one. Source: ONNX operator BatchNormalization (opset 15), whose epsilon is inside the
root.
"""

from math import prod

import onnx_ir as ir

from txopt.exporter.algebra import only_user
from txopt.exporter.fusion.attention_path import fill_of
from txopt.exporter.fusion.norm_path import (
    LayerNorm,
    added_bias,
    axes_of,
    dtype_problem,
    is_weight,
    more_axes,
    read_elsewhere,
    shape_problem,
)
from txopt.exporter.origins import Origins
from txopt.exporter.rearranged import behind, rearranged
from txopt.exporter.shapes import length, number_of, rank_of

_OVER = [-4, -2, -1]  # all but the channels


def match(norm: ir.Node) -> LayerNorm | str | None:
    """The layer norm that the BatchNormalization ``norm`` is a part of, or a reason of refusal.

    None where its statistics are not those of each token, but constants, as a batch norm's are.
    """
    given, ones, zeros, mean, variance = norm.inputs[:5]
    if given is None or mean is None or variance is None or rank_of(given) != 4:
        return None
    taken = _reduced(mean)
    if taken is None or taken.op_type != "ReduceMean" or taken.inputs[0] is not given or axes_of(taken, 4) != _OVER:
        return None
    origins = Origins()
    found = rearranged(given, origins)
    x, rank = found.source, rank_of(found.source)
    batch, tokens, *columns = found.axes if len(found.axes) == 4 else ((0,), (), (), ())
    axis = -len(columns[0] + columns[1])
    apart = tuple((place,) for place in range(rank or 0))
    if batch or not axis or (*tokens, *columns[0], *columns[1]) != tuple(range(rank or 0)):
        return None
    if not _is_variance(variance, given, taken):
        return "its variance is not that of the differences from its mean"
    if fill_of(ones) != 1 or fill_of(zeros) != 0:
        return "its own scale and bias are not ones and zeros"
    if x.dtype == ir.DataType.DOUBLE:
        return "it computes in float64, the operator's statistics are float32"
    back = only_user(norm.outputs[0], "Reshape")
    lengths = [origins.of((x, place)) for place in range(rank or 0)]
    if back is None or behind(back, found.axes, lengths, origins) != apart:
        return "its result is not brought back to the shape of what it is of"
    weighted = only_user(back.outputs[0], "Mul")
    weight = next(filter(is_weight, weighted.inputs), None) if weighted is not None else None
    if weighted is None or weight is None:
        return "no constant weight vector is multiplied at the end"
    bias, last = added_bias(weighted)
    problem = shape_problem(x, axis, weight, bias) or dtype_problem(x, weight, bias) or more_axes(x, weight, bias)
    shapes = [value for value in (ones, zeros, back.inputs[1]) if value is not None]  # which others may share
    problem = problem or read_elsewhere(last, x, weight, *shapes)
    return problem or LayerNorm(x, weight, bias, norm.attributes.get_float("epsilon", 1e-5), axis, last)


def _reduced(value: ir.Value) -> ir.Node | None:
    """What reduced to ``value``, also where the axes were kept and then dropped."""
    node = value.producer()
    inner = node.inputs[0] if node is not None and node.op_type == "Squeeze" else None
    return inner.producer() if inner is not None else node


def _is_variance(variance: ir.Value, given: ir.Value, mean: ir.Node) -> bool:
    """Whether ``variance`` is the average of the squares of ``given`` less ``mean``."""
    division = _reduced(variance)
    total, count = division.inputs if division is not None and division.op_type == "Div" else (None, None)
    squares = None if total is None else _reduced(total)
    if squares is None or squares.op_type != "ReduceSumSquare" or axes_of(squares, 4) != _OVER:
        return False
    difference = squares.inputs[0].producer() if squares.inputs[0] is not None else None
    if difference is None or difference.op_type != "Sub" or list(difference.inputs) != [given, mean.outputs[0]]:
        return False
    sizes = [size for size in (length(given, axis) for axis in _OVER) if isinstance(size, int)]
    return len(sizes) == len(_OVER) and number_of(count) == prod(sizes)
