"""Rounding to nearest: integers by hand, what holds for every weight, and others' implementations."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from tests.calibration.made import SCHEMES, matrices, normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.grid import LEAST_SCALE, Grid, short
from txopt.calibration.packing import for_matmul_nbits
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.errors import SourceError


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


BY_HAND: list[tuple[BlockScheme, NDArray[np.float32], list[int], float, int | None]] = [
    # 8 bits: amax / 127; halves go to even
    (BlockScheme(bits=8), column(127, -63.5, 62.5, 0.5, 1.5, 0), [127, -64, 62, 0, 2, 0], 1, None),
    (BlockScheme(bits=8), column(-31.75, 0.375, 0.125), [-127, 2, 0], 0.25, None),
    # 4 bits: amax / 7.5; the ends are half a step off, and -8 is used
    (BlockScheme(bits=4), column(7.5, -7.5, -6.5, 6.5, 2.5, -0.5), [7, -8, -6, 6, 2, 0], 1, None),
    (BlockScheme(bits=4), column(15, 3, -15), [7, 2, -8], 2, None),
    # asymmetric: (high - low) / 15 or 255, 0 always among low and high
    (BlockScheme(bits=4, symmetric=False), column(-3, 12, 0, 0.5, 1.5, 2.5), [0, 15, 3, 3, 5, 5], 1, 3),
    (BlockScheme(bits=4, symmetric=False), column(30, 7, 16), [15, 4, 8], 2, 0),
    (BlockScheme(bits=4, symmetric=False), column(-15, -1), [0, 14], 1, 15),
    (BlockScheme(bits=4, symmetric=False), column(-1.5, 13.5), [0, 15], 1, 2),  # 14 + 2 is clipped
    (BlockScheme(bits=8, symmetric=False), column(-55, 200, 0), [0, 255, 55], 1, 55),
    # nothing but zeros: the scale is 1, which every engine takes
    (BlockScheme(bits=8), column(0, 0), [0, 0], 1, None),
    (BlockScheme(bits=4, symmetric=False), column(0, -0.0), [0, 0], 1, 0),
    # denormals: the scale is the least normal number
    (BlockScheme(bits=8), column(1e-45, LEAST_SCALE / 2, -LEAST_SCALE), [0, 0, -1], float(LEAST_SCALE), None),
    (BlockScheme(bits=4, symmetric=False), column(-1e-45, LEAST_SCALE), [0, 1], float(LEAST_SCALE), 0),
]


@pytest.mark.parametrize(("scheme", "weight", "codes", "scale", "zero"), BY_HAND)
def test_codes_computed_by_hand(
    scheme: BlockScheme, weight: NDArray[np.float32], codes: list[int], scale: float, zero: int | None
) -> None:
    blocks = round_to_nearest(weight, scheme)
    assert blocks.codes.ravel().tolist() == codes
    assert blocks.scales.tolist() == [[scale]]
    assert (None if blocks.zeros is None else blocks.zeros.tolist()) == (None if zero is None else [[zero]])


def test_every_block_of_every_column_has_its_own_grid() -> None:
    weight = np.zeros((19, 2), np.float32)
    weight[3] = 127, -254
    weight[17] = 12.7, 0
    weight[18] = -6.35, 1
    blocks = round_to_nearest(weight, BlockScheme(block=16))
    assert blocks.scales == pytest.approx(short(np.array([[1, 2], [0.1, 1 / 127]])), rel=1e-7)
    assert blocks.codes[[3, 17, 18]].tolist() == [
        [127, -127],
        [127, 0],
        [-63, 127],
    ]  # 0.1 is no float16: the scale is larger


@given(matrices(), st.sampled_from(SCHEMES))
def test_no_value_is_more_than_half_a_scale_off(weight: NDArray[np.float32], scheme: BlockScheme) -> None:
    blocks = round_to_nearest(weight, scheme)
    scales = np.repeat(blocks.scales, scheme.block, axis=0)[: len(weight)].astype(np.float64)
    errors = np.abs(dequantize(blocks).astype(np.float64) - weight)
    assert (errors <= scales * (0.5 + 1e-4)).all()  # float32 rounds code * scale
    assert (blocks.scales >= LEAST_SCALE).all()
    assert blocks.codes.min() >= scheme.lowest
    assert blocks.codes.max() <= scheme.highest
    assert (dequantize(blocks)[weight == 0] == 0).all()


@given(matrices(), st.sampled_from(SCHEMES))
def test_what_is_on_the_grid_stays(weight: NDArray[np.float32], scheme: BlockScheme) -> None:
    blocks = round_to_nearest(weight, scheme)
    again = round_to_nearest(dequantize(blocks), scheme, choose=lambda _, span: grid_at(blocks, span.start))
    assert (again.codes == blocks.codes).all()


def grid_at(blocks: Blocks, row: int) -> Grid:
    g = row // blocks.scheme.block
    return Grid(blocks.scales[g], None if blocks.zeros is None else blocks.zeros[g].astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_onnx_quantize_linear(scheme: BlockScheme) -> None:
    weight = normal(100, 6)
    blocks = round_to_nearest(weight, scheme)
    dtype = getattr(onnx.TensorProto, f"{'' if scheme.symmetric else 'U'}INT{scheme.bits}")
    zeros = np.zeros(blocks.scales.shape, np.uint8) if blocks.zeros is None else blocks.zeros
    feeds = {"w": weight, "s": blocks.scales}
    node = onnx.helper.make_node("QuantizeLinear", ["w", "s", "z"], ["y"], axis=0, block_size=scheme.block)
    graph = onnx.helper.make_graph(
        [node],
        "quantize",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in feeds],
        [onnx.helper.make_tensor_value_info("y", dtype, None)],
        [onnx.helper.make_tensor("z", dtype, zeros.shape, zeros.ravel())],
    )
    theirs = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, feeds)[0]
    assert (np.asarray(theirs).astype(int) == blocks.codes).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [128, 100])
def test_asymmetric_blocks_are_those_of_onnx_runtime(bits: int, rows: int) -> None:
    weight = normal(rows, 24)
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, bits=bits)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    packed = for_matmul_nbits(round_to_nearest(weight, BlockScheme(bits=bits, block=32, symmetric=False)))
    assert packed.zeros is not None
    larger = packed.scales.numpy() / scales
    assert larger.min() > 1 - 1e-6
    assert larger.max() < 1 + 2**-10  # ours are numbers that float16 holds
    apart = np.abs(levels(packed.codes.numpy(), packed.zeros.numpy(), bits) - levels(codes, zeros, bits))[:, :rows]
    assert apart.max() <= 1
    assert np.mean(apart == 0) > {4: 0.98, 8: 0.8}[bits]  # other scales; and it rounds halves otherwise


def levels(codes: NDArray[np.uint8], zeros: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Codes less their zero points [N,blocks * 32], of MatMulNBits' bytes."""
    each = unpacked(codes.reshape(len(codes), -1), bits)
    offsets = unpacked(zeros, bits)[:, : each.shape[1] // 32]
    return each - np.repeat(offsets, 32, axis=1)


def unpacked(values: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Bytes, or the two halves of each, the low one first."""
    parts = [values] if bits == 8 else [values & 15, values >> 4]
    return np.stack(parts, axis=-1).reshape(len(values), -1).astype(np.int64)


def squares(weight: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    return float(np.square(weight - rounded, dtype=np.float64).sum())


@pytest.mark.parametrize("block", [32, 64, 128])
def test_four_bits_over_amax_lose_less_than_with_amax_over_seven(block: int) -> None:
    weight = normal(512, 64)
    scheme = BlockScheme(bits=4, block=block)
    ours = round_to_nearest(weight, scheme)
    seventh = round_to_nearest(
        weight, scheme, choose=lambda rows, _: Grid((np.abs(rows).max(axis=0) / 7).astype(np.float32), None)
    )
    assert squares(weight, dequantize(ours)) < squares(weight, dequantize(seventh))


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"weight lm_head: expected finite numbers"):
        round_to_nearest(np.array([[np.nan]]), BlockScheme(), name="lm_head")


def test_the_weight_is_left_alone() -> None:
    weight = normal(40, 3)
    before = weight.copy()
    for scheme in SCHEMES:
        round_to_nearest(weight, scheme)
    assert (weight == before).all()
