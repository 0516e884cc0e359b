"""The graphs' contract: tensors, axes and names that every exporter must give and every session may rely on.

Owns the alphabet of axes and the names of inputs and outputs (docs/format.md, "Graphs"). It reads no ONNX file: it
judges what a manifest says of the graphs.

    B sources   R rows, B times beams   Q query length   S self-cache length   T, U, W source lengths
    H heads     D head size             M memory width   V vocabulary          N samples of sound
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from txopt.runtime.strict_json import Fields, show

SOURCE_AXES = ("T", "U", "W")  # most models read one length; more where memories differ in length
AXES = ("B", "R", "Q", "S", *SOURCE_AXES, "N")  # the lengths that vary; H, D, M and V are numbers in every graph
# Before the encoder's name of a mask that the decoder reads too. Where the encoder itself gives an output of that name, that is it.
MASKS = "encoder_"
DTYPES = ("float32", "float16", "bfloat16", "int64", "bool")
FLOATS = DTYPES[:3]
Axes = tuple[str | int, ...]
# int64 [B,T], of encoders that attend to windows: 1 where a token is seen from everywhere and sees everything
GLOBAL_MASK = "global_attention_mask"
# What a decoder may find in its logits itself, of the last token of each row, so that a few numbers leave the device and not all V of
# them. By name: dtype, and how many numbers of a row, None where that is up to the graph.
CHOICE: Mapping[str, tuple[str, int | None]] = {
    "next": ("int64", 1),  # the likeliest token
    "top_values": ("float32", None),  # the largest logits, falling
    "top_ids": ("int64", None),  # their tokens
    "log_sum": ("float32", 1),  # the logarithm of the sum of all logits' exponents
}
RANKED = ("top_values", "top_ids", "log_sum")  # what a search over several tokens reads
_TENSOR_NAME = re.compile(r"[A-Za-z0-9._/:-]{1,200}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph; an axis is a letter of AXES (its length varies) or a fixed length."""

    name: str
    dtype: str
    axes: Axes

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "TensorSpec":
        fields = Fields(value, where, problems, ("name", "dtype", "axes"))
        name, axes = fields.text("name"), fields.items("axes")
        if name and not _TENSOR_NAME.fullmatch(name):
            problems.append(f"{where}.name: expected letters, digits, '.', '_', '-', '/' or ':', found {show(name)}")
        for index, axis in enumerate(axes):
            if not (axis in AXES if isinstance(axis, str) else type(axis) is int and axis > 0):
                expected = f"a length of at least 1, or one of {' '.join(AXES)}"
                problems.append(f"{where}.axes[{index}]: expected {expected}, found {show(axis)}")
        return cls(name=name, dtype=fields.choice("dtype", DTYPES), axes=tuple(axes))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{','.join(map(str, self.axes))}]"


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph: its file, and its inputs and outputs in the file's order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "GraphSpec":
        fields = Fields(value, where, problems, ("file", "inputs", "outputs"))
        inputs, outputs = (
            tuple(
                TensorSpec.from_json(item, f"{where}.{key}[{i}]", problems) for i, item in enumerate(fields.items(key))
            )
            for key in ("inputs", "outputs")
        )
        return cls(file=fields.text("file"), inputs=inputs, outputs=outputs)

    def to_json(self) -> dict[str, Any]:
        inputs, outputs = ([item.to_json() for item in items] for items in (self.inputs, self.outputs))
        return {"file": self.file, "inputs": inputs, "outputs": outputs}


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The self-attention cache: two buffers [R,H,S,D] a layer; ``max_length`` bounds S, None where nothing does."""

    layers: int
    heads: int
    head_size: int
    dtype: str
    max_length: int | None

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "CacheSpec":
        fields = Fields(value, where, problems, ("layers", "heads", "head_size", "dtype", "max_length"))
        return cls(
            layers=fields.count("layers", 1),
            heads=fields.count("heads", 1),
            head_size=fields.count("head_size", 1),
            dtype=fields.choice("dtype", FLOATS),
            max_length=fields.count_or_none("max_length", 1),
        )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def tensors(self, prefix: str) -> tuple[TensorSpec, ...]:
        """The buffers as the decoder sees them: ``prefix`` is "self" (inputs) or "present" (outputs)."""
        axes: Axes = ("R", self.heads, "S", self.head_size)
        names = (f"{prefix}_{part}.{layer}" for layer in range(self.layers) for part in ("key", "value"))
        return tuple(TensorSpec(name=name, dtype=self.dtype, axes=axes) for name in names)


def memory_name(index: int) -> str:
    """The encoder's output of this memory; a decoder that reads several has one output for each."""
    return f"memory.{index}" if index else "memory"


def source_masks(graphs: Mapping[str, GraphSpec]) -> dict[str, str | int]:
    """The encoder's inputs that say where a source has tokens, and the length that each is about."""
    read = {"attention_mask"} | {item.name.removeprefix(MASKS) for item in _masks(graphs.get("decoder"))}
    inputs = graphs["encoder"].inputs if "encoder" in graphs else ()
    return {item.name: item.axes[1] for item in inputs if item.name in read and len(item.axes) == 2}


def frame_masks(graphs: Mapping[str, GraphSpec]) -> dict[str, str | int]:
    """The encoder's outputs that say where a source has frames, where it makes these of samples, and the length that each is about."""
    outputs = graphs["encoder"].outputs if "encoder" in graphs else ()
    return {out.name: out.axes[1] for out in outputs if out.name.startswith(MASKS) and len(out.axes) == 2}


def format_needed(graphs: Mapping[str, GraphSpec]) -> int:
    """The oldest version of the format that has what ``graphs`` use: 2 for several memories, samples, masks of other names."""
    tensors = [tensor for graph in graphs.values() for tensor in (*graph.inputs, *graph.outputs)]
    lengths = {axis for tensor in tensors for axis in tensor.axes} & {*SOURCE_AXES[1:], "N"}
    memories = any(tensor.name.startswith("memory.") for tensor in tensors)
    masks = any(mask.name != f"{MASKS}attention_mask" for mask in _masks(graphs.get("decoder")))
    return 2 if lengths or memories or masks else 1


def _masks(decoder: GraphSpec | None) -> list[TensorSpec]:
    return [] if decoder is None else [item for item in decoder.inputs if item.name.startswith(MASKS)]


def graph_problems(graphs: Mapping[str, GraphSpec], cache: CacheSpec | None) -> list[str]:
    """Where the graphs ("encoder", "decoder", or one of them) break the contract; ``cache`` is the decoder's."""
    problems = [problem for name, graph in graphs.items() for problem in _of_any_graph(name, graph)]
    if cache is None:
        return problems + [
            f"graphs.encoder: expected outputs with the axis B first, found {out}"
            for out in graphs["encoder"].outputs
            if out.axes[:1] != ("B",)
        ]
    if len({graph.file for graph in graphs.values()}) < len(graphs):
        problems.append("graphs: expected a file of its own for each graph")
    cross: tuple[TensorSpec, ...] = ()
    if "encoder" in graphs:
        cross = tuple(out for out in graphs["encoder"].outputs if out.name.startswith("cross_"))
        problems += _of_encoder(graphs["encoder"], cross)
    return problems + list(_of_masks(graphs)) + list(_of_decoder(graphs["decoder"], cache, cross))


def _of_any_graph(name: str, graph: GraphSpec) -> Iterator[str]:
    if not graph.file.endswith(".onnx"):
        yield f"graphs.{name}.file: expected an .onnx file, found {show(graph.file)}"
    for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if not tensors:
            yield f"graphs.{name}.{kind}: expected at least one, found none"
        names = [tensor.name for tensor in tensors]
        if len(set(names)) < len(names):
            yield f"graphs.{name}.{kind}: expected different names, found one twice among {len(names)}"


def _of_encoder(encoder: GraphSpec, cross: tuple[TensorSpec, ...]) -> Iterator[str]:
    found = [out for out in encoder.outputs if out.name == "memory" or out.name.startswith("memory.")]
    memories = {out.name: out for out in found}
    for name in (memory_name(index) for index in range(max(1, len(found)))):
        memory = memories.get(name)
        if memory is None or len(memory.axes) != 3 or memory.axes[0] != "B" or memory.dtype not in FLOATS:
            yield f"graphs.encoder.outputs: expected {name} [B,T,M] of a float type, found {memory or 'none'}"
    pairs = (f"cross_{part}.{layer}" for layer in range(len(cross) // 2) for part in ("key", "value"))
    if not cross or {out.name for out in cross} != set(pairs):
        named = ", ".join(show(out.name) for out in cross[:8]) or "none"
        yield f"graphs.encoder.outputs: expected cross_key.i and cross_value.i for i from 0, found {named}"
    for out in cross:
        fixed = [axis for axis in out.axes[1::2] if isinstance(axis, int)]
        if len(out.axes) != 4 or out.axes[0] != "B" or len(fixed) != 2 or out.dtype not in FLOATS:
            yield f"graphs.encoder.outputs: expected {show(out.name)} [B,H,T,D] of a float type, found {out}"


def _of_masks(graphs: Mapping[str, GraphSpec]) -> Iterator[str]:
    """A mask is an input of both graphs, or goes from one to the other, so that a session can hand it on."""
    encoder = graphs.get("encoder")
    given = {} if encoder is None else {f"{MASKS}{item.name}": item for item in encoder.inputs}
    made = {} if encoder is None else {out.name: out for out in encoder.outputs if out.name.startswith(MASKS)}
    for mask in _masks(graphs["decoder"]):
        known = made.get(mask.name) or given.get(mask.name)
        if known is None:
            name = show(mask.name.removeprefix(MASKS))
            yield f"graphs.decoder.inputs: expected {show(mask.name)} beside an encoder's input {name}, found no such input"
        elif (
            {mask.dtype, known.dtype} != {"int64"}
            or known.axes != mask.axes
            or len(mask.axes) != 2
            or mask.axes[0] != "B"
        ):
            axes = ",".join(map(str, known.axes)) if known.dtype == "int64" and len(known.axes) == 2 else "B,T"
            how = "gives" if mask.name in made else "reads"
            yield f"graphs.decoder.inputs: expected {mask.name} int64 [{axes}], as the encoder {how} it, found {mask}"


def _of_decoder(decoder: GraphSpec, cache: CacheSpec, cross: tuple[TensorSpec, ...]) -> Iterator[str]:
    inputs = {tensor.name: tensor for tensor in decoder.inputs}
    if 2 * cache.layers > len(inputs):  # before anything is built of that many layers
        yield f"graphs.decoder.inputs: expected buffers of {cache.layers} layers, found {len(inputs)} inputs in all"
        return
    for mask in _masks(decoder):  # judged by _of_masks
        inputs.pop(mask.name, None)
    needed = (
        TensorSpec(name="input_ids", dtype="int64", axes=("R", "Q")),
        TensorSpec(name="position", dtype="int64", axes=("R",)),
        *cache.tensors("self"),
        *cross,
    )
    for tensor in needed:
        if (found := inputs.pop(tensor.name, None)) != tensor:
            yield f"graphs.decoder.inputs: expected {tensor}, found {found or 'none'}"
    for name in inputs:
        yield f"graphs.decoder.inputs: unknown input {show(name)}: no session can feed it"

    outputs = {tensor.name: tensor for tensor in decoder.outputs}
    logits = outputs.get("logits")
    if logits is None or logits.dtype != "float32" or not _rows_queries_and_vocabulary(logits.axes):
        yield f"graphs.decoder.outputs: expected logits float32 [R,Q,V], found {logits or 'none'}"
    for tensor in cache.tensors("present"):
        if (found := outputs.get(tensor.name)) != tensor:
            yield f"graphs.decoder.outputs: expected {tensor}, found {found or 'none'}"
    yield from (f"graphs.decoder.outputs: {problem}" for problem in choice_problems(outputs))


def choice_problems(outputs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Where those of CHOICE among a decoder's ``outputs`` are not what a search reads."""
    for name, (dtype, numbers) in CHOICE.items():
        item = outputs.get(name)
        if item is None:
            continue
        wide = len(item.axes) == 2 and isinstance(item.axes[1], int)
        if item.dtype != dtype or item.axes[:1] != ("R",) or not (wide if numbers is None else len(item.axes) == 1):
            yield f"expected {name} {dtype} [R{',K' if numbers is None else ''}], found {item}"
    ranked = [outputs[name].axes[1:] for name in ("top_values", "top_ids") if name in outputs]
    if ranked and not (len(ranked) == 2 and ranked[0] == ranked[1] and "log_sum" in outputs):
        yield "expected top_values and top_ids of one width, and log_sum, together, found some alone or of two widths"


def _rows_queries_and_vocabulary(axes: Axes) -> bool:
    return len(axes) == 3 and axes[:2] == ("R", "Q") and isinstance(axes[2], int)
