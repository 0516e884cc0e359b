"""What TensorRT-RTX's parser and builder say of a graph; neither needs a GPU or a driver.

A warning counts as a refusal: that is how the parser says that it drops an input.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from txopt.exporter import weights
from txopt.runtime.backends.trt_log import log_of

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra test brings TensorRT-RTX for Linux on x86-64")

CACHE = 64  # its length must be known to TensorRT
LENGTHS = (1, 4, 8)  # least, usual and most of every other axis


@dataclass(frozen=True, kw_only=True)
class Built:
    """Layers by kind, and the size of the engine in bytes."""

    layers: Counter[str]
    size: int


class Refused(Exception):
    """It was not parsed, not built, or not without a warning."""


_LOG = log_of(trt)


def build(file: Path, capability: str = "SM89") -> Built:
    """Parses and builds ``file``.

    Raises:
        Refused: it says what TensorRT-RTX said.
    """
    _LOG.forget()
    builder = trt.Builder(_LOG)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, _LOG)
    if not parser.parse_from_file(str(file)):
        raise Refused("\n".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    if _LOG.heard:  # the builder may crash on what comes of it
        raise Refused("\n".join(_LOG.heard))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:  # in float32 there is no kernel of its own for it
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *(tuple(n if d == -1 else d for d in tensor.shape) for n in LENGTHS))
        if tensor.is_shape_tensor:  # something else's length depends on it, as a mask's on the place that is written
            profile.set_shape_input(
                tensor.name, *(([place] * max(1, *tensor.shape)) for place in (0, CACHE // 2, CACHE - 1))
            )
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None or _LOG.heard:
        raise Refused("\n".join(_LOG.heard))
    return Built(layers=Counter(layer.type.name for layer in layers), size=plan.nbytes)


def with_a_fixed_cache(file: Path, folder: Path, axis: str = "S") -> Path:
    """``file`` with the length of its self-attention cache known, and no other change, as a file in ``folder``."""
    model = ir.load(file)
    for value in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([CACHE if str(size) == axis else size for size in value.shape])
    weights.write({file.stem: model}, folder)
    return folder / file.name
