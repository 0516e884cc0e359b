"""Pattern fusions to neutral operators, in the order they run."""

from collections.abc import Callable

import onnx_ir as ir

from txopt.exporter.fusion import attention, einsum, gelu, layer_norm, lengths, qkv, reshape, rms_norm, scale
from txopt.exporter.fusion.report import Report

FUSIONS: tuple[Callable[[ir.Model], Report], ...] = (
    rms_norm.fuse,
    gelu.fuse,
    reshape.fuse,
    scale.fuse,
    qkv.fuse,  # after both: Q, K and V are then cut by one shape, and nothing scales one of them
)

# What graphs from any exporter are searched for; ours never hold a written-out attention or layer norm.
FOREIGN: tuple[Callable[[ir.Model], Report], ...] = (
    layer_norm.fuse,  # before root-mean-square norms, which look the same from the differences on
    rms_norm.fuse,
    gelu.fuse,
    einsum.fuse,  # before attention, which looks for MatMul
    lengths.fuse,  # before attention too, whose scores nothing else may read; after whatever it could be read inside of
    attention.fuse,  # before those that look for the operator
    reshape.fuse,
    scale.fuse,
    qkv.fuse,
)


def fuse(model: ir.Model) -> dict[str, Report]:
    """Runs every fusion on ``model``; reports by operator."""
    return {report.operator: report for report in (fusion(model) for fusion in FUSIONS)}
