"""Traces a ``Source`` to one or two neutral graphs: the encoder (with the cross K/V) and the decoder (prefill and steps alike).

Owns the graphs' inputs, outputs and axis names, and the example shapes of the trace; parity is checked on other shapes. It does
not know families, files or engines.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from txopt.exporter.calls import calling, first_line, shapes
from txopt.exporter.graph import clean, name_axes
from txopt.exporter.operators import OPSET, TRANSLATIONS
from txopt.exporter.plain import plain_modules
from txopt.exporter.recurrent import found_in
from txopt.exporter.source import KV, Facts, Input, Source
from txopt.runtime.cases import source_axis
from txopt.runtime.errors import SourceError, TxoptError
from txopt.runtime.graphs import GLOBAL_MASK, MASKS, CacheSpec, GraphSpec, TensorSpec, memory_name

# Example sizes of the trace: all different, none 0 or 1, which torch.export would freeze.
EXAMPLE = {"B": 2, "R": 6, "Q": 3, "S": 11, "T": 7, "U": 5, "W": 9}

_CACHED = "of its cache decode() may ask positions, self_attention() and cross_attention() (docs/custom-models.md)"
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int64: "int64"}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Neutral graphs by name ("encoder", "decoder"), what the manifest says of them, and the cache's layout."""

    graphs: dict[str, ir.Model]
    specs: dict[str, GraphSpec]
    cache: CacheSpec | None


class _Finite(TorchFunctionMode):
    """Answers "is everything finite?" with yes, which a trace cannot ask.

    BART's and its relatives' encoders clamp float16 states where they have overflowed; parity refuses a model that does overflow.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Yes() if func is torch.isfinite else func(*args, **(kwargs or {}))


class _Yes:
    def all(self) -> bool:
        return True


class _Encoder(nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source, self.module = source, source.traced  # registered, so that weights keep their names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.source.encode(*inputs)


class _Decoder(nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source, self.module = source, source.traced  # registered, so that weights keep their names

    def forward(
        self, tokens: Tensor, position: Tensor, masks: list[Tensor], self_kv: list[KV], cross_kv: list[KV]
    ) -> tuple[Tensor, list[KV]]:
        names = [item.name for item in _decoder_masks(self.source.facts)]
        named = dict(zip(names, masks, strict=True))
        by_memory = [None if memory.mask is None else named[memory.mask] for memory in self.source.facts.memories]
        return self.source.decode(tokens, position, by_memory, self_kv, cross_kv)


def trace(source: Source, dtype: torch.dtype) -> Trace:
    """The neutral graphs of ``source``, whose weights are ``dtype`` already (but for its FP32 islands)."""
    with torch.no_grad(), _quiet(), _Finite(), plain_modules():
        if source.facts.kind == "decoder":
            return _trace_decoder(source, dtype, cross=[])
        examples = [example(item, dtype, source.facts) for item in source.facts.inputs]
        given = {item.name: value for item, value in zip(source.facts.inputs, examples, strict=True)}
        with calling(f"the model fails for {shapes(given)}", _CACHED):
            results = source.encode(*examples)
        names = source.facts.outputs if source.facts.kind == "encoder" else _names(source.facts, len(results))
        outputs = tuple(
            _spec(name, value, _encoder_axes(source.facts, name, value))
            for name, value in zip(names, results, strict=True)
        )
        inputs = tuple(
            TensorSpec(name=i.name, dtype=NAMES[v.dtype], axes=i.axes)
            for i, v in zip(source.facts.inputs, examples, strict=True)
        )
        spec = GraphSpec(file="encoder.onnx", inputs=inputs, outputs=outputs)
        graph = _export(_Encoder(source), tuple(examples), (_dynamic(inputs),), spec)
        if source.facts.kind == "encoder":
            return Trace(graphs={"encoder": graph}, specs={"encoder": spec}, cache=None)
        cross = [pair for pair in zip(outputs, results, strict=True) if pair[0].name.startswith("cross_")]
        traced = _trace_decoder(source, dtype, cross=cross)
        return Trace(
            graphs={"encoder": graph, **traced.graphs}, specs={"encoder": spec, **traced.specs}, cache=traced.cache
        )


def example(item: Input, dtype: torch.dtype, facts: Facts) -> Tensor:
    """An input of the trace: the example sizes, no longer than the model's positions."""
    shape = [axis if isinstance(axis, int) else _example_size(facts, axis) for axis in item.axes]
    if item.dtype == "int64":
        value = torch.ones(shape, dtype=torch.int64)
        return value if item.name in (*facts.masks, GLOBAL_MASK) else value * 2
    return torch.zeros(shape, dtype=dtype)


def _example_size(facts: Facts, axis: str) -> int:
    if axis == "N" and facts.framing is not None:
        return facts.framing.samples(_example_size(facts, "T"))
    return min(EXAMPLE[axis], facts.limit_of(axis) or EXAMPLE[axis])


def _decoder_masks(facts: Facts) -> list[Input]:
    """The masks that the decoder takes, each once, in the order of the memories; of frames where the encoder's are of samples."""
    inputs = {item.name: item for item in facts.inputs}
    found = [inputs[name] for name in dict.fromkeys(memory.mask for memory in facts.memories) if name is not None]
    return found if facts.framing is None else [replace(item, axes=("B", "T")) for item in found]


def _trace_decoder(source: Source, dtype: torch.dtype, cross: Sequence[tuple[TensorSpec, Tensor]]) -> Trace:
    """``cross`` is what the encoder gives of the cross-attention cache: K, V of each cross-attention in turn."""
    layers, heads, size = source_cache_shape(source)
    values = [value for _, value in cross]
    pairs = list(zip(values[::2], values[1::2], strict=True))
    buffer = torch.zeros(EXAMPLE["R"], heads, EXAMPLE["S"], size, dtype=dtype)
    self_kv = [(buffer.clone(), buffer.clone()) for _ in range(layers)]
    tokens = torch.full((EXAMPLE["R"], EXAMPLE["Q"]), 2, dtype=torch.int64)
    position = torch.full((EXAMPLE["R"],), 1, dtype=torch.int64)
    masks = _decoder_masks(source.facts)
    named = {item.name: example(item, dtype, source.facts) for item in masks}

    specs = [_spec("input_ids", tokens, ("R", "Q")), _spec("position", position, ("R",))]
    specs += [_spec(f"{MASKS}{item.name}", named[item.name], item.axes) for item in masks]
    own = ("R", heads, "S", size)
    specs += [_spec(f"self_{kind}.{i}", buffer, own) for i in range(layers) for kind in ("key", "value")]
    specs += [spec for spec, _ in cross]
    outputs = [TensorSpec(name="logits", dtype="float32", axes=("R", "Q", source.facts.vocabulary))]
    outputs += [_spec(f"present_{kind}.{i}", buffer, own) for i in range(layers) for kind in ("key", "value")]
    spec = GraphSpec(file="decoder.onnx", inputs=tuple(specs), outputs=tuple(outputs))

    by_name = {item.name: item for item in specs}
    dims = [
        _dynamic(specs[:1])[0],
        _dynamic(specs[1:2])[0],
        list(_dynamic([by_name[f"{MASKS}{name}"] for name in named])),
        [_dynamic((by_name[f"self_key.{i}"], by_name[f"self_value.{i}"])) for i in range(layers)],
        [_dynamic((by_name[f"cross_key.{i}"], by_name[f"cross_value.{i}"])) for i in range(len(pairs))],
    ]
    graph = _export(_Decoder(source), (tokens, position, list(named.values()), self_kv, pairs), tuple(dims), spec)
    cache = CacheSpec(layers=layers, heads=heads, head_size=size, dtype=NAMES[dtype], max_length=source.facts.limit)
    return Trace(graphs={"decoder": graph}, specs={"decoder": spec}, cache=cache)


def source_cache_shape(source: Source) -> tuple[int, int, int]:
    """(layers, heads, head size) of the self-attention cache, read off one real pass rather than off names in a configuration."""
    inputs = (
        {}
        if source.facts.kind == "decoder"
        else {i.name: example(i, next(source.module.parameters()).dtype, source.facts) for i in source.facts.inputs}
    )
    kv = source.forward(inputs, torch.full((EXAMPLE["B"], 2), 2, dtype=torch.int64)).self_kv
    if not kv:
        raise SourceError(
            "the decoder wrote no self-attention K/V: it is not a Transformer decoder, or its attention bypasses the cache"
        )
    shapes = {tuple(x.shape[1::2]) for pair in kv for x in pair}
    if len(shapes) > 1:
        raise SourceError(f"layers with different heads or head sizes are not supported yet: {sorted(shapes)}")
    return len(kv), kv[0][0].shape[1], kv[0][0].shape[3]


def _names(facts: Facts, count: int) -> tuple[str, ...]:
    """What an encoder-decoder's encoder gives: see ``Source.encode``."""
    memories = [memory_name(index) for index in range(len(facts.memories))]
    masks = [f"{MASKS}{item.name}" for item in _decoder_masks(facts)] if facts.framing is not None else []
    pairs = (count - len(memories) - len(masks)) // 2
    return (*memories, *(f"cross_{kind}.{i}" for i in range(pairs) for kind in ("key", "value")), *masks)


def _encoder_axes(facts: Facts, name: str, value: Tensor) -> tuple[str | int, ...]:
    """The source length is a symbol where the inputs have one, else the number the model makes of its fixed input."""
    kind, _, index = name.partition(".")
    length: str | int | None
    if facts.kind == "encoder":
        length = "T" if value.dim() == 3 and any("T" in item.axes for item in facts.inputs) else None
    elif kind in ("memory", "cross_key", "cross_value"):
        length = (facts.memories[int(index or 0)] if kind == "memory" else facts.cross_memory(int(index))).axis
    else:
        return tuple(_decoder_masks(facts)[0].axes)
    where = source_axis(name)
    return tuple(
        "B" if i == 0 else length if i == where and length is not None else int(size)
        for i, size in enumerate(value.shape)
    )


def _spec(name: str, value: Tensor, axes: tuple[str | int, ...]) -> TensorSpec:
    return TensorSpec(name=name, dtype=NAMES[value.dtype], axes=axes)


_DIMS = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in (*EXAMPLE, "N")}


def _dynamic(specs: Sequence[TensorSpec]) -> tuple[dict[int, object], ...]:
    return tuple({i: _DIMS[axis] for i, axis in enumerate(spec.axes) if isinstance(axis, str)} for spec in specs)


def _export(module: nn.Module, arguments: tuple[object, ...], dims: tuple[object, ...], spec: GraphSpec) -> ir.Model:
    try:
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dims,
            custom_translation_table=TRANSLATIONS,
            input_names=[item.name for item in spec.inputs],
            output_names=[item.name for item in spec.outputs],
            optimize=False,
            verbose=False,
        )
    except TxoptError:
        raise
    except Exception as err:  # torch raises a dozen kinds, with pages of text
        if isinstance(err.__cause__, TxoptError):
            raise err.__cause__ from err
        cause = _unrolled(module) or "control flow on the values of tensors is the usual cause"
        raise SourceError(
            f"torch cannot trace this model to {spec.file}: {first_line(err)}; {cause} (docs/custom-models.md)"
        ) from err
    if program is None:
        raise SourceError("torch.onnx.export returned nothing")
    model = clean(program.model)
    _check_axes(model, spec, module)
    name_axes(model, {item.name: item.axes for item in (*spec.inputs, *spec.outputs)})
    return model


def _check_axes(model: ir.Model, spec: GraphSpec, module: nn.Module) -> None:
    """torch.onnx.export fixes what a model's code fixes, and goes on: such a graph would serve the example's sizes alone."""
    axes = {item.name: item.axes for item in (*spec.inputs, *spec.outputs)}
    by_side = [
        [
            f"{value.name}: {axis} = {dim}"
            for value in side
            for axis, dim in zip(axes[str(value.name)], value.shape or (), strict=True)
            if isinstance(axis, str) and isinstance(dim, int)
        ]
        for side in (model.graph.inputs, model.graph.outputs)
    ]
    if fixed := by_side[0] or by_side[1]:  # a size that is fixed in an input is so in what is made of it
        cause = _unrolled(module) or "int() of a size does that, and so do libraries that call it"
        sizes = "; ".join(fixed)
        raise SourceError(
            f"the model's code fixes sizes of {spec.file} to those of the example ({sizes}): {cause} (docs/custom-models.md)"
        )


def _unrolled(module: nn.Module) -> str:
    """What to say of a model's recurrent layers; nothing where it has none."""
    layers = ", ".join(found_in(module))
    return layers and (
        f"recurrent layers that are run ({layers}) do that, for torch writes them out step by step; put attention or convolutions in "
        "their place"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own insides; a user can act on none of it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript.optimizer")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
