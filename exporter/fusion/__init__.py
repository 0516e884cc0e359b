"""Pattern fusions to neutral operators, in the order they run."""

from collections.abc import Sequence

import onnx_ir as ir

from txopt.exporter.fusion import (
    attention,
    choices,
    einsum,
    gelu,
    groups,
    layer_norm,
    lengths,
    log_softmax,
    matrices,
    projections,
    qkv,
    ranking,
    reductions,
    reshape,
    rms_norm,
    rotary,
    saturation,
    scale,
    softmax,
    windows,
)
from txopt.exporter.fusion.proof import Fusion, apply, prove
from txopt.exporter.fusion.recording import Feeds
from txopt.exporter.fusion.report import NOTHING, Report

# What graphs from any exporter are searched for.
FOREIGN: tuple[Fusion, ...] = (
    saturation.fuse,  # before reductions, one of which it takes away
    reductions.fuse,  # before whatever looks for means, sums and largest numbers
    layer_norm.fuse,  # before root-mean-square norms, which look the same from the differences on
    rms_norm.fuse,
    gelu.fuse,
    rotary.fuse,
    log_softmax.fuse,
    softmax.fuse,  # after logarithms, whose sums of exponentials look the same; before what looks for the operator
    ranking.fuse,  # after logarithms, which may be ranked too
    choices.fuse,  # before attention, which looks for Where; before lengths, as a mask may be in the shape of scores
    einsum.fuse,  # before attention, which looks for MatMul
    matrices.fuse,  # before attention, which looks for batches and heads as axes; before lengths, which follows them then
    projections.fuse,  # before lengths too, of which it needs fewer
    lengths.fuse,  # before attention too, whose scores nothing else may read; after whatever it could be read inside of
    attention.fuse,  # before those that look for the operator
    windows.fuse,  # as attention, for what it does not look at; after lengths
    reshape.fuse,
    groups.fuse,  # after attention and Reshapes of Reshapes, behind which it looks
    scale.fuse,
    qkv.fuse,  # after these: Q, K and V are then cut by one shape, and nothing scales one of them
)

# What our own are searched for. Custom modules write out what they like, too; but lengths are read where they first appear, and
# windows that are cut by strides are the old exporter's.
FUSIONS: tuple[Fusion, ...] = tuple(rule for rule in FOREIGN if rule not in (lengths.fuse, windows.fuse))


def fuse(
    model: ir.Model, fusions: Sequence[Fusion] = FUSIONS, feeds: Sequence[Feeds] | None = None
) -> dict[str, Report]:
    """Runs ``fusions`` on ``model``, the bodies of its branches and loops included; reports by operator.

    Where there are ``feeds``, every rewrite is proved on them or left out.
    """
    reports = (apply(fusion, model, NOTHING) if feeds is None else prove(fusion, model, feeds) for fusion in fusions)
    return {report.operator: report for report in reports}
