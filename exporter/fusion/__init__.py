"""Pattern fusions to neutral operators, in the order they run."""

from collections.abc import Sequence

import onnx_ir as ir

from txopt.exporter.fusion import (
    attention,
    einsum,
    gelu,
    layer_norm,
    lengths,
    log_softmax,
    qkv,
    ranking,
    reductions,
    reshape,
    rms_norm,
    rotary,
    scale,
    softmax,
    windows,
)
from txopt.exporter.fusion.proof import Fusion, apply, prove
from txopt.exporter.fusion.recording import Feeds
from txopt.exporter.fusion.report import NOTHING, Report

FUSIONS: tuple[Fusion, ...] = (
    rms_norm.fuse,
    gelu.fuse,
    rotary.fuse,
    reshape.fuse,
    scale.fuse,
    qkv.fuse,  # after both: Q, K and V are then cut by one shape, and nothing scales one of them
)

# What graphs from any exporter are searched for; ours never hold a written-out attention or layer norm.
FOREIGN: tuple[Fusion, ...] = (
    reductions.fuse,  # before whatever looks for means, sums and largest numbers
    layer_norm.fuse,  # before root-mean-square norms, which look the same from the differences on
    rms_norm.fuse,
    gelu.fuse,
    rotary.fuse,
    log_softmax.fuse,
    softmax.fuse,  # after logarithms, whose sums of exponentials look the same; before what looks for the operator
    ranking.fuse,  # after logarithms, which may be ranked too
    einsum.fuse,  # before attention, which looks for MatMul
    lengths.fuse,  # before attention too, whose scores nothing else may read; after whatever it could be read inside of
    attention.fuse,  # before those that look for the operator
    windows.fuse,  # as attention, for what it does not look at; after lengths
    reshape.fuse,
    scale.fuse,
    qkv.fuse,
)


def fuse(
    model: ir.Model, fusions: Sequence[Fusion] = FUSIONS, feeds: Sequence[Feeds] | None = None
) -> dict[str, Report]:
    """Runs ``fusions`` on ``model``, the bodies of its branches and loops included; reports by operator.

    Where there are ``feeds``, every rewrite is proved on them or left out.
    """
    reports = (apply(fusion, model, NOTHING) if feeds is None else prove(fusion, model, feeds) for fusion in fusions)
    return {report.operator: report for report in reports}
