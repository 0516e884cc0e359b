"""Packed blocks: bytes by hand, and engines that compute from them what dequantize() says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.calibration.graphs import engine, reference, single
from tests.calibration.made import SCHEMES, normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.packing import (
    Packed,
    for_dequantize_linear,
    for_dequantized_table,
    for_gather,
    for_matmul_nbits,
    from_dequantize_linear,
)
from txopt.calibration.rounding import round_to_nearest
from txopt.exporter import weights
from txopt.runtime.errors import UsageError

LENGTHS = [256, 128 + 37, 10]  # whole blocks, a short last block of an odd number of them, one short block


def blocks_of(scheme: BlockScheme, rows: int = 165, columns: int = 24) -> Blocks:
    """Every code occurs, zero points of one side and the other."""
    lean = np.linspace(-2, 2, columns, dtype=np.float32)
    return round_to_nearest(normal(rows, columns) + lean, scheme)


def four_bits() -> Blocks:
    """17 rows in blocks of 16, so that the last block holds one code."""
    codes = np.array([[-8, 7], *[[1, -1]] * 15, [3, 0]], np.int8)
    return Blocks(codes, np.array([[1, 2], [3, 4]], np.float32), None, BlockScheme(bits=4, block=16))


def test_symmetric_codes_of_four_bits_are_moved_up_by_eight_and_paired() -> None:
    packed = for_matmul_nbits(four_bits())
    assert packed.codes.numpy().tolist() == [
        [[0x90, *[0x99] * 7], [0x8B, *[0x88] * 7]],
        [[0x7F, *[0x77] * 7], [0x88, *[0x88] * 7]],
    ]
    assert packed.scales.numpy().tolist() == [[1, 3], [2, 4]]
    assert packed.zeros is None
    assert packed.attributes == {"K": 17, "N": 2, "bits": 4, "block_size": 16}


def test_symmetric_codes_of_eight_bits_are_moved_up_by_128() -> None:
    codes = np.array([[-127], [0], [127]], np.int8)
    packed = for_matmul_nbits(Blocks(codes, np.ones((1, 1), np.float32), None, BlockScheme(bits=8, block=16)))
    assert packed.codes.numpy().tolist() == [[[1, 128, 255, *[128] * 13]]]


def test_zero_points_of_four_bits_are_paired_along_a_column_s_blocks() -> None:
    scheme = BlockScheme(bits=4, block=16, symmetric=False)
    zeros = np.array([[1, 2], [3, 4], [5, 6]], np.uint8)
    codes = np.full((35, 2), 9, np.uint8)
    packed = for_matmul_nbits(Blocks(codes, np.ones((3, 2), np.float32), zeros, scheme))
    assert packed.zeros is not None
    assert packed.zeros.numpy().tolist() == [[0x31, 0x05], [0x42, 0x06]]
    assert packed.codes.numpy()[0, 2].tolist() == [0x99, 0x59, *[0x55] * 6]  # filled with the zero point


def test_a_lookup_and_a_product_read_the_same_bytes() -> None:
    for scheme in SCHEMES:
        product, lookup = for_matmul_nbits(blocks_of(scheme)), for_gather(blocks_of(scheme))
        assert product.codes.tobytes() == lookup.codes.tobytes()
        for ours, theirs in zip(product.inputs[1:], lookup.inputs[1:], strict=True):
            assert (ours.numpy() == theirs.numpy()).all()
            assert ours.shape == theirs.shape


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("run", [engine, reference])
def test_dequantize_linear_gives_exactly_the_weight(
    run: Callable[[ir.Model], list[NDArray[np.float32]]], scheme: BlockScheme, rows: int
) -> None:
    blocks = blocks_of(scheme, rows)
    weight = dequantize(blocks)
    assert (run(single("DequantizeLinear", for_dequantize_linear(blocks)))[0] == weight).all()
    assert (run(single("DequantizeLinear", for_dequantized_table(blocks)))[0] == weight.T).all()


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gather_block_quantized_gives_exactly_the_rows_of_the_table(scheme: BlockScheme, rows: int) -> None:
    blocks = blocks_of(scheme, rows)
    indices = np.array([[0, 23], [7, 7]])
    result = engine(single("GatherBlockQuantized", for_gather(blocks), indices=indices), indices=indices)[0]
    assert (result[..., :rows] == dequantize(blocks).T[indices]).all()
    assert (result[..., rows:] == 0).all()


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_matmul_nbits_multiplies_by_the_weight(scheme: BlockScheme, rows: int) -> None:
    blocks = blocks_of(scheme, rows)
    weight, x = dequantize(blocks), normal(5, rows, seed=1)
    packed = for_matmul_nbits(blocks)
    exact = x.astype(np.float64) @ weight
    most = np.abs(x) @ np.abs(weight)

    packed.attributes["accuracy_level"] = 0
    assert (np.abs(engine(single("MatMulNBits", packed, x=x), x=x)[0] - exact) <= 2e-6 * most).all()

    # x is rounded to int8 in blocks of the weight's size, each number by at most half of amax / 127
    packed.attributes["accuracy_level"] = 4
    steps = np.concatenate(
        [np.full_like(x[:, s], np.abs(x[:, s]).max(1)[:, None] / 127) for s in scheme.spans(rows)], 1
    )
    bound = 0.5 * steps @ np.abs(weight) + 2e-6 * most
    errors = np.abs(engine(single("MatMulNBits", packed, x=x), x=x)[0] - exact)
    assert (errors <= bound).all()
    assert errors.max() > 2e-6 * most.max()  # else nothing was rounded, and this test shows nothing


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_tied_table_is_stored_once_and_serves_both(scheme: BlockScheme, tmp_path: Path) -> None:
    rows = 256
    blocks = blocks_of(scheme, rows)
    product, lookup = for_matmul_nbits(blocks), for_gather(blocks)
    x = ir.val("x", ir.DataType.FLOAT, [3, rows])
    indices = ir.val("indices", ir.DataType.INT64, [4])
    shared = [initializer(f"shared{n}", tensor) for n, tensor in enumerate(product.inputs[1:])]
    codes = initializer("product", product.codes), initializer("lookup", lookup.codes)
    nodes = [
        ir.node("MatMulNBits", [x, codes[0], *shared], attributes=product.attributes, domain="com.microsoft"),
        ir.node(
            "GatherBlockQuantized",
            [codes[1], indices, *shared],
            attributes=lookup.attributes,
            domain="com.microsoft",
        ),
    ]
    outputs = [node.outputs[0] for node in nodes]
    for output, name in zip(outputs, ("logits", "embeddings"), strict=True):
        output.name, output.dtype = name, ir.DataType.FLOAT
    opsets = {"": 24, "com.microsoft": 1}
    graph = ir.Graph([x, indices], outputs, nodes=nodes, initializers=[*codes, *shared], opset_imports=opsets)
    written = weights.write({"tied": ir.Model(graph, ir_version=11)}, tmp_path)
    assert written == sum(tensor.nbytes for tensor in product.inputs if tensor.nbytes >= weights.INLINE_BYTES)

    session = onnxruntime.InferenceSession(tmp_path / "tied.onnx", providers=["CPUExecutionProvider"])
    feeds = {"x": normal(3, rows), "indices": np.array([0, 5, 23, 5])}
    logits, embeddings = session.run(None, feeds)
    assert (embeddings == dequantize(blocks).T[feeds["indices"]]).all()
    assert logits == pytest.approx(feeds["x"] @ dequantize(blocks), abs=1e-3)


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    return ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )


@pytest.mark.parametrize("pack", [for_dequantize_linear, for_dequantized_table])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_come_back_from_a_graph(pack: Callable[[Blocks], Packed], scheme: BlockScheme) -> None:
    blocks = blocks_of(scheme)
    packed = pack(blocks)
    read = [ir.from_proto(ir.to_proto(tensor)) for tensor in packed.inputs]
    back = from_dequantize_linear(*read[:2], read[2] if len(read) > 2 else None, **packed.attributes)
    assert back.scheme == scheme
    assert (back.codes == blocks.codes).all()
    assert (back.scales == blocks.scales).all()
    assert (back.zeros is None) == scheme.symmetric
    assert back.zeros is None or (back.zeros == blocks.zeros).all()


def test_unsigned_codes_without_zero_points_have_zero_points_of_0() -> None:
    codes, scales = ir.Tensor(np.full((16, 2), 7, np.uint8)), ir.Tensor(np.ones((1, 2), np.float32))
    back = from_dequantize_linear(codes, scales, None, axis=0, block_size=16)
    assert (dequantize(back) == 7).all()


@pytest.mark.parametrize(
    ("dtype", "zeros", "said"),
    [(np.int32, False, "INT32 without"), (np.int8, True, "INT8 with"), (np.int16, True, "INT16 with")],
)
def test_a_dequantize_linear_of_no_scheme_is_refused(dtype: type, zeros: bool, said: str) -> None:
    codes, scales = ir.Tensor(np.zeros((16, 2), dtype), name="w"), ir.Tensor(np.ones((1, 2), np.float32))
    with pytest.raises(UsageError, match=f"quantized weight w: .* got {said} zero points"):
        from_dequantize_linear(codes, scales, codes if zeros else None, axis=0, block_size=16)
