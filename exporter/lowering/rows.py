"""Products of whole columns of codes for ONNX Runtime's CPU: activations become integers row by row when the graph runs.

MatMul(x [..,K], DequantizeLinear(codes [K,N], scales [N])) becomes a product of integers, which its kernels compute fastest (uint8
with int8), and of two scales. With m the largest magnitude in a row of x:

    q = trunc(x * (127 / m) + 128.5)        uint8, 1 to 255, 128 stands for 0
    y = (sum over K of (q - 128) * codes) * (scales / 127) * m

A row has its own scale and sums of integers are exact, so that a row's product is equal to the bit in any batch.
"""

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant, is_table, is_weight, remove
from txopt.exporter.lowering.tables import look_up

CONTRIB = "com.microsoft"
PRODUCT = "MatMulIntegerToFloat"
LARGEST, MIDDLE = 127, 128
LEAST = 1e-30  # of a row's magnitude, so that rows of zeros give 0, and 127 / m stays finite


def lower_rows(model: ir.Model) -> None:
    """Changes ``model`` in place; weights in blocks stay as they are."""
    graph = model.graph
    rounded = Rows(graph)
    for node in [node for node in graph if is_weight(node) and "block_size" not in node.attributes]:
        for user, index in list(node.outputs[0].uses()):
            if user.op_type == "MatMul" and index == 1 and not is_table(node):
                rounded.multiply(user, node.inputs[0], node.inputs[1])
            elif user.op_type == "Gather" and index == 0:
                look_up(graph, user)
            elif user.op_type == "Transpose" and is_table(node):
                _turn(graph, node, user, rounded)
        if node.graph is not None and not node.outputs[0].uses():
            remove(graph, node)
    if any(node.op_type == PRODUCT for node in graph):
        model.opset_imports[CONTRIB] = 1


def activations_of(product: ir.Node) -> ir.Value:
    """x of a product of ``lower_rows``."""
    node: ir.Node | None = product
    for _ in range(3):  # Cast, Add, Mul
        assert node is not None, "lower_rows made it"
        value = node.inputs[0]
        node = None if value is None else value.producer()
    assert node is not None, "lower_rows made it"
    assert node.inputs[0] is not None, "lower_rows made it"
    return node.inputs[0]


def _turn(graph: ir.Graph, weight: ir.Node, transpose: ir.Node, rounded: "Rows") -> None:
    """A head on a table: its codes are turned once, when a session opens."""
    heads = [user for user, place in transpose.outputs[0].uses() if user.op_type == "MatMul" and place == 1]
    codes, scales = weight.inputs[:2]
    assert codes is not None, "is_weight() asked"
    turned = ir.node("Transpose", [codes], attributes={"perm": [1, 0]}, name=f"{codes.name}/turned")
    turned.outputs[0].type = codes.type
    graph.insert_before(next(iter(graph)), turned)
    for head in heads:
        rounded.multiply(head, turned.outputs[0], scales)
    if not transpose.outputs[0].uses():
        graph.remove(transpose, safe=True)


class Rows:
    """The products of one graph; values that several of them read are rounded once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def multiply(self, product: ir.Node, codes: ir.Value | None, scales: ir.Value | None) -> None:
        x = product.inputs[0]
        assert x is not None, "MatMul has two inputs"
        if x not in self._rounded:
            self._rounded[x] = self._round(x)
        q, magnitude = self._rounded[x]
        step = self._number("step", np.float32(1 / LARGEST))
        integers = [q, self._own(codes), step, scales, self._number("middle", np.uint8(MIDDLE))]
        result = product.outputs[0]
        made = ir.node(PRODUCT, integers, domain=CONTRIB, name=f"{result.name}/integers")
        scaled = ir.node("Mul", [made.outputs[0], magnitude], name=f"{result.name}/scaled")
        new = scaled.outputs[0]
        new.name, new.shape, new.type = result.name, result.shape, result.type
        self._graph.insert_before(product, [made, scaled])
        result.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(product, safe=True)

    def _own(self, codes: ir.Value | None) -> ir.Value | None:
        """``codes`` for one product more: of a weight that several read, each has a name of its own, for bytes that are stored once.

        Without VNNI on x86 ONNX Runtime (1.32) makes such codes unsigned, by name, and does not open a graph where it did so before.
        """
        readers = 0 if codes is None else sum(user.op_type == PRODUCT for user, _ in codes.uses())
        if not readers or codes is None or codes.const_value is None:
            return codes
        return constant(self._graph, f"{codes.name}_{readers + 1}", ir.Tensor(codes.const_value.numpy()))

    def stand_in(self, product: ir.Node) -> None:
        """``product`` in float32, of the rounded activations."""
        x = product.inputs[0]
        assert x is not None, "MatMul has two inputs"
        if x not in self._rounded:
            self._rounded[x] = self._round(x)
        q, magnitude = self._rounded[x]
        name = f"{product.outputs[0].name}/rows"
        wide = ir.node("Cast", [q], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/wide")
        middle = self._number("middle/float", np.float32(MIDDLE))
        codes = ir.node("Sub", [wide.outputs[0], middle], name=f"{name}/codes")
        step = ir.node("Mul", [magnitude, self._number("step", np.float32(1 / LARGEST))], name=f"{name}/step")
        values = ir.node("Mul", [codes.outputs[0], step.outputs[0]], name=f"{name}/values")
        self._graph.insert_before(product, [wide, codes, step, values])
        product.replace_input_with(0, values.outputs[0])

    def _round(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """q like ``x`` in uint8, and m [..,1]."""
        name, last = f"{x.name}/rows", constant(self._graph, "rows/last", ir.Tensor(np.array([-1])))
        absolute = ir.node("Abs", [x], name=f"{name}/absolute")
        largest = ir.node("ReduceMax", [absolute.outputs[0], last], name=f"{name}/largest")
        magnitude = ir.node(
            "Max", [largest.outputs[0], self._number("least", np.float32(LEAST))], name=f"{name}/magnitude"
        )
        inverse = ir.node(
            "Div", [self._number("most", np.float32(LARGEST)), magnitude.outputs[0]], name=f"{name}/inverse"
        )
        scaled = ir.node("Mul", [x, inverse.outputs[0]], name=f"{name}/scaled")
        moved = ir.node(
            "Add", [scaled.outputs[0], self._number("half", np.float32(MIDDLE + 0.5))], name=f"{name}/moved"
        )
        q = ir.node("Cast", [moved.outputs[0]], attributes={"to": ir.DataType.UINT8}, name=f"{name}/integers")
        nodes = [absolute, largest, magnitude, inverse, scaled, moved, q]
        producer = x.producer()
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), nodes)
        else:
            self._graph.insert_after(producer, nodes)
        return q.outputs[0], magnitude.outputs[0]

    def _number(self, name: str, number: np.generic) -> ir.Value:
        return constant(self._graph, f"rows/{name}", ir.Tensor(np.array(number)))
