"""A foreign .onnx file: what it must be, how it comes to the opset of our graphs, and how it is made small.

Whoever calls this parses bytes of unknown origin with native code: ``foreign_child`` does, in a process of its own. It knows no
fusion and no engine.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, version_converter

from txopt.exporter.bodies import fix_names, paths, share_equal_nodes
from txopt.exporter.graph import FOLD_LIMIT, remove_identities, transpose_weights
from txopt.exporter.onnx_weights import skeleton
from txopt.exporter.softmax import restore_softmaxes
from txopt.exporter.weights import INLINE_BYTES
from txopt.runtime.errors import SourceError, explain

OPSET = 24
OLDEST_OPSET = 11
_IR_VERSION = 10  # the least that knows opset 24's operators to ONNX Runtime
_STANDARD = ("", "ai.onnx")
_FEW = 8
_LENGTHS = 8  # elements: equal axes, shapes and scalars are made one, weights that happen to be equal are not


def parse(path: Path) -> onnx.ModelProto:
    """The file without its large weights, which it names as external data: of itself, or of the file that has them.

    Raises:
        SourceError: it is no ONNX file, or not a whole one.
    """
    expected = "expected an ONNX file"
    try:
        proto = onnx.ModelProto.FromString(skeleton(path))
    except OSError as err:
        raise SourceError(f"{path}: cannot be read: {err.strerror or err}") from err
    except Exception as err:  # protobuf's own, which depends on how it was built
        raise SourceError(
            f"{path}: {expected}, found bytes that are none, or only the first of one; copy or export it again"
        ) from err
    if not proto.ir_version or not proto.HasField("graph") or not proto.graph.node:
        raise SourceError(f"{path}: {expected}, found one without a graph; copy or export it again")
    return proto


def check(proto: onnx.ModelProto, path: Path) -> None:
    """Raises SourceError with every reason why this file cannot be processed."""
    problems = [*_opset_problems(proto), *_operator_problems(proto)]
    for tensor in tensors(proto):
        problems += _tensor_problems(tensor, path)
    if problems:
        shown = [*problems[:_FEW], *([f"and {len(problems) - _FEW} more"] if len(problems) > _FEW else [])]
        raise SourceError(explain(f"{path}: cannot be processed:", shown))
    try:
        onnx.checker.check_model(_emptied(proto))
    except onnx.checker.ValidationError as err:
        raise SourceError(f"{path}: expected a valid ONNX graph, found: {str(err).strip()}; export it again") from err


def _emptied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose external tensors have no elements: the checker would look for their files, which was done."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0]
    return copy


def load(path: Path) -> ir.Model:
    """The model as it is in the file; its large weights stay there until they are asked for."""
    model = ir.from_proto(parse(path))
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    passes.RemoveInitializersFromInputsPass()(model)  # ir_version 3 had all weights there
    return model


def convert(model: ir.Model, path: Path) -> None:
    """Brings ``model``, which came from ``path``, to opset 24, in place and without functions.

    onnxscript's converter holds from opset 18 on; below, it leaves old attributes in place (ReduceMean's axes, Unsqueeze's) and
    says nothing. onnx's own holds from opset 11. ``fallback`` takes the first where it holds and the second where not, with
    the weights left out, of which it takes less than 2 GB.

    Raises:
        SourceError: neither can do it.
    """
    found = model.opset_imports.get("")
    version_converter.convert_version(model, OPSET, fallback=True)
    # Large constants of nodes come back without theirs.
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    if model.opset_imports.get("") != OPSET:
        raise SourceError(
            f"{path}: is of opset {found} and holds operators that cannot be brought to {OPSET}; export it with opset 17 or newer"
        )
    model.ir_version = max(model.ir_version or 0, _IR_VERSION)


def clean(model: ir.Model) -> None:
    """Changes ``model`` in place: constants folded up to FOLD_LIMIT elements, equal nodes made one, unused ones removed.

    Every node has a name of its own then, and no small constant is in another file.

    Of onnxscript's optimizer only the folding: its rewrite rules take an epsilon of 1e-12 (BERT) for zero.
    """
    for graph in paths(model):
        names = Counter(node.name for node in graph)
        for index, node in enumerate(graph):
            if not node.name or names[node.name] > 1:  # reports tell nodes by their names
                node.name = f"{node.name or node.op_type}_{index}"
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    remove_identities(model.graph)
    transpose_weights(model)
    fold(model)
    restore_softmaxes(model.graph)
    passes.RemoveUnusedOpsetsPass()(model)
    fix_names(model)
    _bring_in(model)
    model.producer_name, model.producer_version = "txopt", None


def fold(model: ir.Model) -> None:
    """Changes ``model`` in place: constants of up to FOLD_LIMIT elements folded, equal nodes made one, unused ones removed."""
    for _ in range(2):  # what was folded may make two nodes equal, and those a constant
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=_is_a_number,
        )
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.DeduplicateInitializersPass(size_limit=_LENGTHS)(model)
        share_equal_nodes(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _is_a_number(node: ir.Node) -> bool | None:
    """Whether a ConstantOfShape has no axes, as in torch's old exporter; TensorRT's parser warns of empty shapes. None: as usual."""
    shape = node.inputs[0].const_value if node.op_type == "ConstantOfShape" and node.inputs[0] is not None else None
    return True if shape is not None and not shape.size else None


def _bring_in(model: ir.Model) -> None:
    """Whoever writes the graph finds places for large initializers of the main graph only."""
    for graph in paths(model):
        for value in graph.initializers.values():
            tensor, least = value.const_value, INLINE_BYTES if graph is model.graph else float("inf")
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < least:
                value.const_value = _loaded(tensor)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _loaded(attribute.value))


def _loaded(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def opset(proto: onnx.ModelProto) -> int | None:
    return next((entry.version for entry in proto.opset_import if entry.domain in _STANDARD), None)


def _opset_problems(proto: onnx.ModelProto) -> Iterator[str]:
    found = opset(proto)
    if found is None or not OLDEST_OPSET <= found <= OPSET:
        what = f"opset {found}" if found is not None else "none"
        yield f"expected a standard opset from {OLDEST_OPSET} to {OPSET}, found {what}; export it with another"


def _operator_problems(proto: onnx.ModelProto) -> Iterator[str]:
    functions = {(function.domain, function.name) for function in proto.functions}
    version = opset(proto) or OPSET
    custom: Counter[str] = Counter()
    for node in nodes(proto.graph, *proto.functions):
        if (node.domain, node.op_type) in functions:
            continue
        if node.domain not in _STANDARD or not onnx.defs.has(node.op_type, min(version, OPSET)):
            custom[operator(node)] += 1
    if custom:
        found = ", ".join(f"{count} {name}" for name, count in sorted(custom.items()))
        yield (
            f"expected operators of the ONNX standard alone, found {found}; "
            "give the file as it was exported, before an engine's own optimizer"
        )


def _tensor_problems(tensor: onnx.TensorProto, path: Path) -> Iterator[str]:
    name = tensor.name or "a constant"
    if tensor.data_type == onnx.TensorProto.STRING:
        yield f"{name}: expected numbers, found strings"
        return
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        yield from _external_problems(name, tensor, path)
        return
    try:
        expected = stored_bytes(tensor)
    except (KeyError, ValueError):
        yield f"{name}: expected a tensor type of the standard, found number {tensor.data_type}"
        return
    if tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        yield f"{name}: expected {expected} bytes, found {len(tensor.raw_data)}; the file is damaged"


def _external_problems(name: str, tensor: onnx.TensorProto, path: Path) -> Iterator[str]:
    entries = external(tensor)
    location, folder = entries.get("location", ""), path.parent.resolve()
    file = folder / location
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
        yield f"{name}: expected external data inside {folder}, found {location!r}; put the data beside the graph"
        return
    if not file.is_file():
        yield f"{name}: expected its data in {file}, found no file there; copy it along with the graph"
        return
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", stored_bytes(tensor)))
        wanted = stored_bytes(tensor)
    except (KeyError, ValueError):
        yield f"{name}: expected an offset and a length of its external data, found {entries}"
        return
    if offset < 0 or length != wanted or offset + length > file.stat().st_size:
        yield (
            f"{name}: expected {wanted} bytes at {offset} in {file}, found {length} of a file of {file.stat().st_size}; "
            "copy or export it again"
        )


def nodes(*graphs: Any) -> Iterator[onnx.NodeProto]:
    """Every node of graphs or functions, those inside branches and loops included."""
    waiting: list[Any] = [*graphs]
    while waiting:
        for node in waiting.pop().node:
            yield node
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    for node in nodes(proto.graph, *proto.functions):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graph.initializer


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def elements(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def stored_bytes(tensor: onnx.TensorProto) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(tensor.name)
    return -(-elements(tensor) * ir.DataType(tensor.data_type).bitwidth // 8)


def operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"
