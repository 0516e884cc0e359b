"""Queries and edits on onnx_ir models that every stage shares; they know no family and no engine."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from txopt.calibration.quantize import constant

# Constants up to this many elements are folded into new ones; weights are larger, and stay the tensors the checkpoint has.
FOLD_LIMIT = 1024

WEIGHT_PREFIX = "module."

# What onnxscript's rules take for a zero and for a one that changes nothing: anything this near.
_NEAR = {0.0: 1e-8, 1.0: 1e-5}


def clean(model: ir.Model) -> ir.Model:
    """The exporter's graph made small and reproducible: folded, named after the checkpoint, without traces of this machine."""
    _name_weights(model)
    model = passes.InlinePass()(model).model
    transpose_weights(model)
    remove_identities(model.graph)
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT
    )
    _keep_near_numbers(model.graph)
    optimizer.optimize_ir(
        model, num_iterations=2, onnx_shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT
    )
    for remove in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    ):
        model = remove(model).model
    _strip(model)
    return model


def _keep_near_numbers(graph: ir.Graph) -> None:
    """Numbers near zero or one that are neither, such as an epsilon of 1e-12, get an axis: the rules look at those without one."""
    for node in [node for node in graph.all_nodes() if node.op_type in ("Add", "Sub", "Mul", "Div")]:
        for index, value in enumerate(node.inputs):
            number = None if value is None else ir.convenience.get_const_tensor(value)
            other = node.inputs[1 - index]
            if number is None or len(number.shape) or other is None or not other.shape:
                continue
            distances = {exact: abs(float(number.numpy()) - exact) for exact in _NEAR}
            if any(0 < distance <= _NEAR[exact] for exact, distance in distances.items()):
                node.replace_input_with(index, _with_an_axis(graph, number))


def _with_an_axis(graph: ir.Graph, number: ir.TensorProtocol) -> ir.Value:
    name = f"numbers/{number.dtype.name.lower()}_{float(number.numpy())!r}"
    return constant(graph, name, ir.tensor(number.numpy().reshape(1), dtype=number.dtype))


def remove_identities(graph: ir.Graph) -> None:
    """Identity nodes, but for those that give an output its own name, the graph's or a branch's: two outputs must not be one value."""
    for node in [node for node in graph.all_nodes() if node.op_type == "Identity"]:
        if node.graph is not None and node.inputs[0] is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            node.graph.remove(node, safe=True)


def name_axes(model: ir.Model, axes: Mapping[str, Sequence[str | int]]) -> None:
    """Gives every symbolic axis the name that ``axes`` has for it, by input or output; torch's own names go everywhere."""
    names: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for dim, axis in zip(value.shape or (), axes[str(value.name)], strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(axis, str) and dim.value is not None:
                names[str(dim.value)] = axis  # a symbol, or what is computed from one: frames T from samples N
    symbol = re.compile(r"\b(" + "|".join(filter(str.isidentifier, names)) + r")\b") if names else None

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None or symbol is None:
            return dim if isinstance(dim, int) else None
        said = str(dim.value)
        return names.get(said) or symbol.sub(lambda match: names[match.group()], said)

    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def count(model: ir.Model) -> dict[str, int]:
    """Nodes by operator, those in branches and loops too, contrib operators with their domain."""
    names = (node.op_type if not node.domain else f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes())
    return dict(sorted(Counter(names).items()))


def integers(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """The int64 constant ``numbers`` [len(numbers)] as an initializer of ``graph``, made once."""
    return constant(graph, "integers/" + "_".join(map(str, numbers)), ir.tensor(np.array(numbers, np.int64)))


def reshaped(weight: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The initializer ``weight`` in another shape, as one that is made once and computed when it is asked for."""
    tensor, graph = weight.const_value, weight.graph
    assert tensor is not None, "an initializer has a value"
    assert graph is not None, "and a graph"
    name = f"{weight.name}.{'x'.join(map(str, shape))}"
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )
    return constant(graph, name, lazy)


def transpose_weights(model: ir.Model) -> None:
    """``Linear`` arrives as Transpose(weight) -> MatMul: stores the weight transposed, unless something else reads it as it is.

    A tied embedding keeps its Transpose: one table serves both ends, and the lowering finds an operator that reads it so.
    """
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if node.graph is None or weight is None or weight.const_value is None or weight.graph is not model.graph:
            continue
        others = {user.op_type for user, _ in weight.uses()} - {"Transpose"}
        permutation = node.attributes["perm"].as_ints() if "perm" in node.attributes else [1, 0]
        if others or list(permutation) != [1, 0] or node.outputs[0].is_graph_output():
            continue
        name = f"{weight.name}.T"
        if name not in model.graph.initializers:
            model.graph.initializers[name] = _transposed(weight.const_value, name)
        stored = model.graph.initializers[name]
        node.outputs[0].replace_all_uses_with(stored)
        node.graph.remove(node, safe=True)
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.Value:
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape(tuple(reversed(tensor.shape.numpy()))),
        name=name,
        cache=False,
    )
    return ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(tensor.dtype), const_value=lazy)


def _name_weights(model: ir.Model) -> None:
    for name in list(model.graph.initializers):
        if name.startswith(WEIGHT_PREFIX):
            model.graph.initializers[name].name = name.removeprefix(WEIGHT_PREFIX)


def _strip(model: ir.Model) -> None:
    """Removes stack traces, paths and versions that would differ between two machines, and the shapes between nodes."""
    for owner in (model, model.graph):
        owner.metadata_props.clear()
        owner.doc_string = None
    model.producer_name, model.producer_version = "txopt", None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for index, node in enumerate(model.graph):
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{_readable(scope)}{node.op_type}_{index}"
        for output in node.outputs:
            output.metadata_props.clear()


def _readable(scope: str) -> str:
    """ "['', 'module', 'module.decoder.block.0', 'matmul']" to "decoder.block.0/"."""
    parts = [part.strip(" '[]") for part in scope.split(",")]
    modules = [part.removeprefix(WEIGHT_PREFIX) for part in parts[:-1] if part.startswith(WEIGHT_PREFIX)]
    return f"{modules[-1]}/" if modules else ""
