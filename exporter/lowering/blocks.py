"""Quantized weights for ONNX Runtime's CPU: one operator that multiplies with the integers, one that looks rows up in them.

MatMul behind a DequantizeLinear becomes com.microsoft MatMulNBits, a bias with it; Gather becomes GatherBlockQuantized. Both read
one table where a head is tied to it. MatMulNBits computes with activations of 8 bits, scaled for every row and block by themselves
(accuracy_level 4): what a row says does not depend on the batch that it is in.
"""

import onnx_ir as ir

from txopt.calibration.blocks import Blocks
from txopt.calibration.packing import Packed, for_gather, for_matmul_nbits
from txopt.calibration.quantize import blocks_of, constant, is_table, is_weight, remove
from txopt.exporter.graph import integers

CONTRIB = "com.microsoft"
ACCURACY = 4  # int8 activations; 0 would leave them in float32, which is many times slower


def lower_blocks(model: ir.Model) -> None:
    """Changes ``model`` in place; a DequantizeLinear whose readers are something else stays, for ONNX Runtime has a kernel for it."""
    graph = model.graph
    for node in [node for node in graph if is_weight(node) and "block_size" in node.attributes]:
        _Weight(graph, node).lower()
    if any(node.domain == CONTRIB for node in graph):
        model.opset_imports[CONTRIB] = 1


def weight_of(node: ir.Node) -> str:
    """The name of the weight that ``node`` reads: an operator of ``lower_blocks``, a product of ``lower_rows``, a DequantizeLinear."""
    codes = node.inputs[0 if node.op_type in ("GatherBlockQuantized", "DequantizeLinear") else 1]
    assert codes is not None, "such an operator has codes"
    turned = codes.producer()  # a head's Transpose
    codes = codes if turned is None else turned.inputs[0]
    assert codes is not None, "a Transpose has an input"
    return str(codes.name).rpartition("/")[0]


class _Weight:
    """One dequantized weight, and its readers, which are rewritten one by one."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self._value = node.outputs[0]
        self._name = str(self._value.name).removesuffix("/rounded")
        self._blocks: Blocks = blocks_of(node)
        self._table = is_table(node)

    def lower(self) -> None:
        for user, index in list(self._value.uses()):
            if user.op_type == "MatMul" and index == 1 and not self._table:
                self._multiply(user)
            elif user.op_type == "Gather" and index == 0 and self._table:
                self._look_up(user)
            elif user.op_type == "Transpose" and self._table:
                for head, place in list(user.outputs[0].uses()):
                    if head.op_type == "MatMul" and place == 1:
                        self._multiply(head)
                if not user.outputs[0].uses():
                    self._graph.remove(user, safe=True)
        if not self._value.uses():
            remove(self._graph, self._node)

    def _multiply(self, node: ir.Node) -> None:
        packed = for_matmul_nbits(self._blocks)
        added = _bias(node, columns=self._blocks.codes.shape[1])
        bias, last = (None, node) if added is None else added
        inputs = [node.inputs[0], *self._stored(packed, "columns")]
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        attributes = {**packed.attributes, "accuracy_level": ACCURACY}
        self._replace(last, ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB, name=node.name))
        if last is not node:
            self._graph.remove(node, safe=True)

    def _look_up(self, node: ir.Node) -> None:
        packed = for_gather(self._blocks)
        codes, *grids = self._stored(packed, "rows")
        inputs = [codes, node.inputs[1], *grids]
        new = ir.node("GatherBlockQuantized", inputs, attributes=packed.attributes, domain=CONTRIB, name=node.name)
        width = len(self._blocks.codes)
        if width % new.attributes["block_size"].as_int() == 0:
            self._replace(node, new)
            return
        bounds = [integers(self._graph, [number]) for number in (0, width, -1)]
        # The last block is filled up with zeros.
        cut = ir.node("Slice", [new.outputs[0], *bounds], name=f"{node.name}/cut")
        self._graph.insert_before(node, new)
        self._replace(node, cut)

    def _stored(self, packed: Packed, arrangement: str) -> list[ir.Value]:
        """The operator's constants as initializers; scales and zero points are the same for both operators."""
        parts = zip((arrangement, "steps", "offsets"), packed.inputs, strict=False)
        return [constant(self._graph, f"{self._name}/{part}", tensor) for part, tensor in parts]

    def _replace(self, old: ir.Node, new: ir.Node) -> None:
        result, made = old.outputs[0], new.outputs[0]
        made.name, made.shape, made.type = result.name, result.shape, result.type
        self._graph.insert_before(old, new)
        result.replace_all_uses_with(made, replace_graph_outputs=True)
        self._graph.remove(old, safe=True)


def _bias(node: ir.Node, columns: int) -> tuple[ir.Value, ir.Node] | None:
    """(bias [N], the Add of it) where nothing but that Add reads the product, of so many ``columns``, N."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    known = bias is not None and bias.const_value is not None and list(bias.const_value.shape) == [columns]
    return (bias, add) if known and bias is not None else None
