"""Optimum's encoder and whole-sequence decoder to txopt's two graphs: encoder with cross K/V, decoder over buffers.

    load       each file checked, one decoder taken out of a merged one's If, brought to opset 24, made small
    trace      attention found, lengths made plain, the cross K/V moved to the encoder, the decoder given its buffers
    fuse       the rest of the patterns

Owns names and axes; what is done to the decoder is buffered.py's. Runs in a process of its own (optimum_child.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter import buffered, description, onnx_file
from txopt.exporter.buffered import LOGITS, MASK, MEMORY, TOKENS, Blocks
from txopt.exporter.fusion import FOREIGN, attention
from txopt.exporter.fusion.report import NOTHING
from txopt.exporter.measured import Kind, Reading, simplify
from txopt.exporter.optimum_folder import Folder
from txopt.exporter.probe import Probe
from txopt.exporter.source import Facts
from txopt.exporter.weights import INLINE_BYTES
from txopt.runtime.errors import SourceError, explain
from txopt.runtime.graphs import CacheSpec, GraphSpec, TensorSpec

_BRANCH = "use_cache_branch"
_SIZES = {"B": (2, 3), "L": (5, 7), "T": (11, 13)}
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


@dataclass
class Graphs:
    """The two graphs; the fusions' reports by graph; what the manifest says of them, once they are finished."""

    encoder: ir.Model
    decoder: ir.Model
    reports: dict[str, dict[str, Any]]

    def models(self) -> dict[str, ir.Model]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def specs(self) -> dict[str, GraphSpec]:
        return {name: _spec(model, f"{name}.onnx") for name, model in self.models().items()}


def load(folder: Folder) -> Graphs:
    """Both files, opset 24, attention written out.

    Raises:
        SourceError: a file is no ONNX, not whole, not float32, or has inputs and outputs that Optimum does not give it.
    """
    encoder, decoder = (_opened(path) for path in (folder.encoder, folder.decoder))
    if folder.merged:
        _take_branch(decoder, folder.decoder)
    wanted = [item.name for item in folder.family.inputs]
    problems = [*_problems(encoder, folder.encoder, wanted, [])]
    masked = [MASK] if "attention_mask" in wanted else []
    problems += _problems(decoder, folder.decoder, [TOKENS, MEMORY, *masked], [LOGITS])
    wide = [value.shape[-1] for value in decoder.graph.inputs if value.name == MEMORY and value.shape is not None]
    if wide and isinstance(wide[0], int) and wide[0] != folder.config.hidden_size:
        width = folder.config.hidden_size
        problems.append(
            f"{folder.decoder.name}: expected states of width {width}, as config.json says, found {wide[0]}"
        )
    if problems:
        raise SourceError(explain(f"{folder.path}: expected an encoder-decoder as Optimum exports it:", problems))
    for model, path in ((encoder, folder.encoder), (decoder, folder.decoder)):
        onnx_file.convert(model, path)
        onnx_file.clean(model)
    return Graphs(encoder=encoder, decoder=decoder, reports={})


def past_shapes(folder: Folder) -> dict[str, list[int]]:
    """Inputs past_key_values.* of the decoder's file, [1,H,1,D] each."""
    proto = onnx_file.parse(folder.decoder)
    inputs = description.of_file(proto, folder.decoder)["inputs"]
    past = [item for item in inputs if item["name"].startswith("past_key_values.")]
    return {item["name"]: [size if isinstance(size, int) else 1 for size in item["shape"] or ()] for item in past}


def _opened(path: Path) -> ir.Model:
    onnx_file.check(onnx_file.parse(path), path)
    return onnx_file.load(path)


def _take_branch(model: ir.Model, path: Path) -> None:
    """The whole-sequence decoder out of a merged file, in place: what its one If does without a cache."""
    graph = model.graph
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    found = [node for node in graph if node.op_type == "If"]
    asked = found[0].inputs[0] if len(found) == 1 else None
    if asked is None or asked.name != _BRANCH or graph.num_nodes() != 1:
        raise SourceError(f"{path}: expected one If on {_BRANCH} around both decoders, found a graph of another form")
    other, branch = (found[0].attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    nodes, results, names = list(branch), list(branch.outputs), [value.name for value in found[0].outputs]
    branch.outputs.clear()
    branch.remove(nodes)
    other.outputs.clear()
    other.remove(list(other), safe=True)  # or its nodes would count as readers of the weights
    graph.outputs.clear()
    graph.remove(found[0])
    graph.extend(nodes)
    for value, name in zip(results, names, strict=True):
        value.name = name
    graph.outputs.extend(results)
    graph.inputs[:] = [value for value in graph.inputs if value.name in (TOKENS, MEMORY, MASK)]


def _problems(model: ir.Model, path: Path, inputs: list[str], outputs: list[str]) -> list[str]:
    found = [str(value.name) for value in model.graph.inputs]
    given = [str(value.name) for value in model.graph.outputs]
    problems = []
    if sorted(found) != sorted(inputs):
        problems.append(f"{path.name}: expected the inputs {', '.join(inputs)}, found {', '.join(found)}")
    problems += [
        f"{path.name}: expected the output {name}, found {', '.join(given)}" for name in outputs if name not in given
    ]
    narrow = sorted({str(v.dtype) for v in model.graph.outputs if v.dtype is not None and v.dtype != ir.DataType.FLOAT})
    if narrow:
        problems.append(f"{path.name}: expected float32, found {', '.join(narrow)}; export it without --dtype")
    if any(attribute.type == ir.AttributeType.GRAPH for node in model.graph for attribute in node.attributes.values()):
        problems.append(f"{path.name}: expected no loops and branches, found some; export it with a newer optimum-onnx")
    return problems


def split(graphs: Graphs, facts: Facts, width: int) -> CacheSpec:
    """Changes both graphs in place: cross K/V to the encoder, buffers to the decoder. ``width`` is that of the encoder's states.

    Raises:
        SourceError: the decoder is not one that can be given a cache; see buffered.py.
    """
    reading = _decoder_reading(graphs.decoder.graph, width)
    for name, model in graphs.models().items():
        report = attention.fuse(model)
        graphs.reports[name] = {report.operator: report.to_json()}
        passes.CommonSubexpressionEliminationPass()(model)
    simplify(graphs.encoder, _encoder_reading(facts))
    simplify(graphs.decoder, reading)
    decoder = graphs.decoder.graph
    found = buffered.blocks(decoder, reading)
    heads, size, vocabulary = _measure(decoder, found, reading)
    if vocabulary != facts.vocabulary:
        raise SourceError(
            f"config.json says a vocabulary of {facts.vocabulary}, the decoder's logits have {vocabulary}"
        )
    _append_cross(graphs.encoder, buffered.cross_part(decoder, found))
    buffered.rewrite(graphs.decoder, found, reading, limit=facts.limit, heads=heads, size=size)
    share_table(graphs.decoder)
    _name_axes(graphs, facts, (heads, size), (width, vocabulary))
    return CacheSpec(layers=len(found.own), heads=heads, head_size=size, dtype="float32", max_length=facts.limit)


def _decoder_reading(graph: ir.Graph, width: int) -> Reading:
    shapes: dict[str, tuple[str | int, ...]] = {TOKENS: ("B", "L"), MEMORY: ("B", "T", width), MASK: ("B", "T")}
    present = {str(value.name) for value in graph.inputs}
    tokens, source = (TOKENS, 1), (MEMORY, 1)
    return Reading(
        roles={name: Kind.TOKENS if name == TOKENS else Kind.SOURCE for name in present},
        sizes=_SIZES,
        homes={
            Kind.TOKENS: {"B": (TOKENS, 0), "L": tokens, "T": source},
            Kind.SOURCE: {"B": (MEMORY, 0), "L": tokens, "T": source},
        },
        shapes={name: axes for name, axes in shapes.items() if name in present},
    )


def _encoder_reading(facts: Facts) -> Reading:
    homes = {
        axis: (item.name, index)
        for item in facts.inputs
        for index, axis in enumerate(item.axes)
        if isinstance(axis, str)
    }
    return Reading(
        roles={item.name: Kind.TOKENS for item in facts.inputs},
        sizes={letter: _SIZES[letter] for letter in homes},
        homes={Kind.TOKENS: homes},
        shapes={item.name: item.axes for item in facts.inputs},
    )


def _measure(graph: ir.Graph, found: Blocks, reading: Reading) -> tuple[int, int, int]:
    """(heads, head size, vocabulary), read off one run."""
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    caches = [value for node in (*found.own, *found.cross) for value in node.inputs[1:3] if value is not None]
    with Probe(graph, [logits, *caches]) as probe:
        answers = probe.run(reading.feeds(graph, {letter: sizes[0] for letter, sizes in _SIZES.items()}))
    shapes = {answers[str(value.name)].shape for value in caches}
    sizes = {(shape[1], shape[3]) for shape in shapes if len(shape) == 4}
    if len(sizes) != 1:
        raise SourceError(f"expected K and V of equal heads in all layers, found the shapes {sorted(shapes)}")
    ((heads, size),) = sizes
    return int(heads), int(size), int(answers[LOGITS].shape[-1])


def _append_cross(encoder: ir.Model, part: ir.Graph) -> None:
    """``part``, from MEMORY to the cross K/V, behind the encoder."""
    graph, memory = encoder.graph, encoder.graph.outputs[0]
    outputs, nodes = list(part.outputs), list(part)
    for value in (*part.initializers.values(), *(output for node in nodes for output in node.outputs)):
        value.name = f"cross/{value.name}"
    for node in nodes:
        node.name = f"cross/{node.name}"
    (states,) = part.inputs
    states.replace_all_uses_with(memory)
    weights = list(part.initializers.values())
    part.outputs.clear()
    part.initializers.clear()
    part.remove(nodes)
    for value in weights:
        graph.initializers[str(value.name)] = value
    graph.extend(nodes)
    memory.name = "memory"
    for index, value in enumerate(outputs):
        value.name = f"cross_{('key', 'value')[index % 2]}.{index // 2}"
    graph.outputs[:] = [memory, *outputs]


def share_table(model: ir.Model) -> None:
    """A head whose weight is the embedding transposed reads the embedding: the exporter stored it twice."""
    graph = model.graph
    tables = {node.inputs[0] for node in graph if node.op_type == "Gather" and node.inputs[0] is not None}
    stored = [value for value in tables if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES]
    for node in [node for node in graph if node.op_type == "MatMul"]:
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        shape = tuple(reversed(weight.const_value.shape.numpy()))
        for table in stored:
            assert table.const_value is not None, "chosen for it"
            if table.const_value.shape.numpy() != shape or not np.array_equal(
                table.const_value.numpy().T, weight.const_value.numpy()
            ):
                continue
            turn = ir.node("Transpose", [table], attributes={"perm": [1, 0]}, name=f"{node.name}/table")
            turn.outputs[0].shape, turn.outputs[0].type = weight.shape, weight.type
            graph.insert_before(node, turn)
            node.replace_input_with(1, turn.outputs[0])
            if not weight.uses():
                del graph.initializers[str(weight.name)]
            break


def _name_axes(graphs: Graphs, facts: Facts, head: tuple[int, int], width: tuple[int, int]) -> None:
    """The axes of docs/format.md on all inputs and outputs; between them, lengths of the old names are renamed or forgotten."""
    shapes: dict[str, tuple[str | int, ...]] = {item.name: item.axes for item in facts.inputs}
    memory = graphs.encoder.graph.outputs[0]
    length = "T" if any("T" in item.axes for item in facts.inputs) else _fixed(memory)
    shapes["memory"] = ("B", length, width[0])
    inputs = {str(value.name): value.shape for value in graphs.encoder.graph.inputs}
    renamed = {_symbol(inputs[item.name], i): axis for item in facts.inputs for i, axis in enumerate(item.axes)}
    _rename(graphs.encoder.graph, renamed)
    decoder = graphs.decoder.graph
    tokens = next(value for value in decoder.inputs if value.name == TOKENS)
    _rename(decoder, {_symbol(tokens.shape, 0): "R", _symbol(tokens.shape, 1): "Q"})
    own, cross = ("R", head[0], "S", head[1]), ("B", head[0], length, head[1])
    decoder_shapes: dict[str, tuple[str | int, ...]] = {TOKENS: ("R", "Q"), "position": ("R",), MASK: ("B", length)}
    decoder_shapes[LOGITS] = ("R", "Q", width[1])
    for graph, named in ((graphs.encoder.graph, shapes), (decoder, decoder_shapes)):
        for value in (*graph.inputs, *graph.outputs):
            by_kind = {"cross": cross, "self": own, "present": own}
            value.shape = ir.Shape(named.get(str(value.name)) or by_kind[str(value.name).partition("_")[0]])
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)


def _fixed(memory: ir.Value) -> int:
    size = memory.shape[1] if memory.shape is not None else None
    if not isinstance(size, int):
        raise SourceError(
            f"the encoder's states have a length of {size}, but its inputs have fixed sizes: expected a number"
        )
    return size


def _symbol(shape: ir.Shape | None, axis: int) -> str | None:
    dim = None if shape is None else shape[axis]
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _rename(graph: ir.Graph, names: Mapping[str | None, str | int]) -> None:
    letters = {*"BRQST"}
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
                value.shape = ir.Shape(
                    [dim if isinstance(dim, int) or dim in letters else names.get(dim) if dim else None for dim in dims]
                )


def fuse(graphs: Graphs) -> None:
    """The patterns that are left, on both graphs; ``graphs.reports`` says what they did."""
    for name, model in graphs.models().items():
        for fusion in FOREIGN:
            if fusion is not attention.fuse:
                report = fusion(model, NOTHING)
                graphs.reports[name][report.operator] = report.to_json()
        _strip(model)


def _strip(model: ir.Model) -> None:
    """Without what the exporter wrote for itself, and with a name for every value."""
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.graph.name = "txopt", None, "main"


def _spec(model: ir.Model, file: str) -> GraphSpec:
    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=str(value.name),
                dtype=_DTYPES[value.dtype],
                axes=tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape),
            )
            for value in values
        )

    return GraphSpec(file=file, inputs=specs(model.graph.inputs), outputs=specs(model.graph.outputs))
