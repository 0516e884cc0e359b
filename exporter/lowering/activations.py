"""Activations as engines round them on their way into products with integers, written out in float32.

So a graph says all that a quantized artifact means, and parity compares like with like. For weights in whole columns it is what
rows.py makes of x; for those in blocks what ONNX Runtime's MatMulNBits does within (accuracy_level 4, versions 1.30 to 1.32): of each
row and block, m the largest magnitude in it,

    x becomes round(x / (m / 127)) * (m / 127)        half to even
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from txopt.calibration.linears import Role, reads
from txopt.calibration.quantize import constant
from txopt.exporter.graph import integers
from txopt.exporter.lowering.rows import LARGEST, Rows

_LEAST = float(np.finfo(np.float32).tiny)


def round_activations(graph: ir.Graph, blocks: Mapping[str, int | None]) -> None:
    """Rounds what products with these initializers of ``graph`` read; ``blocks`` holds the rows of their blocks, None for all of them.

    Values whose rank is not known stay as they are.
    """
    rows, made = Rows(graph), dict[tuple[ir.Value, int], ir.Value]()
    for read in reads(graph):
        x = read.activations
        if read.name not in blocks or x is None or read.role is Role.TABLE:
            continue
        block = blocks[read.name]
        if block is None:
            rows.stand_in(read.node)
        elif x.shape is not None:
            if (x, block) not in made:
                made[x, block] = _rounded(graph, x, len(x.shape), read.size, block)
            read.node.replace_input_with(0, made[x, block])


def _rounded(graph: ir.Graph, x: ir.Value, rank: int, width: int, block: int) -> ir.Value:
    """``x`` [..,width] by rows and blocks; the last block may be short."""
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes=attributes, name=f"{x.name}/blocks_{block}/{len(nodes)}"))
        return nodes[-1].outputs[0]

    def number(value: float) -> ir.Value:
        return constant(graph, f"blocks/{value}", ir.Tensor(np.array(value, np.float32)))

    short = -width % block
    whole = add("Pad", x, integers(graph, [0] * (2 * rank - 1) + [short])) if short else x
    parts = add("Reshape", whole, integers(graph, [0] * (rank - 1) + [-1, block]))
    largest = add("ReduceMax", add("Abs", parts), integers(graph, [-1]), keepdims=1)
    step = add("Max", add("Div", largest, number(LARGEST)), number(_LEAST))
    values = add("Mul", add("Round", add("Div", parts, step)), step)
    result = add("Reshape", values, integers(graph, [0] * (rank - 1) + [-1]))
    if short:
        result = add("Slice", result, *(integers(graph, [bound]) for bound in (0, width, -1)))
    producer = x.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), nodes)
    else:
        graph.insert_after(producer, nodes)
    return result
