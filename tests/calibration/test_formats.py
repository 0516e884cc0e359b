"""The two formats of 8 bits: codes by hand, their bytes as the standard has them, and both engines' own rounding."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import engine, graph, node, reference, rows
from tests.calibration.made import normal
from txopt.calibration.channels import per_channel
from txopt.calibration.formats import FORMATS, FP8, INT8, Format
from txopt.calibration.static import place

WIDTH = 64

E4M3 = {  # value: (the code nearest to it, its byte: sign, four bits of exponent with a bias of 7, three of mantissa)
    0.0: (0.0, 0x00),
    1.0: (1.0, 0b0_0111_000),
    -1.5: (-1.5, 0b1_0111_100),
    1.0625: (1.0, 0b0_0111_000),  # halfway between 1 and 1.125: to the even mantissa
    1.1875: (1.25, 0b0_0111_010),  # halfway between 1.125 and 1.25
    17.1: (18.0, 0b0_1011_001),
    448.0: (448.0, 0b0_1111_110),
    447.0: (448.0, 0b0_1111_110),
    -1000.0: (-448.0, 0b1_1111_110),  # saturated: the next pattern is NaN
    464.5: (448.0, 0b0_1111_110),
    2.0**-6: (2.0**-6, 0b0_0001_000),  # the least normal number
    2.0**-9: (2.0**-9, 0b0_0000_001),  # the least of all
    1.5 * 2.0**-9: (2.0**-8, 0b0_0000_010),  # halfway, to even
    2.0**-10: (0.0, 0x00),  # halfway to the least, to even
}


@pytest.mark.parametrize(("value", "expected"), E4M3.items())
def test_codes_of_e4m3_by_hand(value: float, expected: tuple[float, int]) -> None:
    code = FP8.encode(np.array([value], np.float32))
    assert (float(code[0]), int(code.view(np.uint8)[0])) == expected


@pytest.mark.parametrize(
    ("value", "code"), [(0.5, 0), (1.5, 2), (-2.5, -2), (126.6, 127), (127.5, 127), (-128.0, -127), (1e30, 127)]
)
def test_codes_of_int8_by_hand(value: float, code: int) -> None:
    assert INT8.encode(np.array([value], np.float32)).tolist() == [code]


@pytest.mark.parametrize(("codes", "amax", "scale"), [(FP8, 448.0, 1.0), (FP8, 7.0, 1 / 64), (FP8, 0.0, 1.0)])
def test_a_scale_reaches_amax(codes: Format, amax: float, scale: float) -> None:
    assert codes.scale(amax) == scale


def test_a_weight_of_fp8_by_hand() -> None:
    weight = np.array([[448, 0, -0.875], [-17.1, 0, 3.5], [1.0625, 0, 1.7500001]], np.float32)
    made = per_channel(weight, FP8)
    assert made.codes.dtype == ir.DataType.FLOAT8E4M3FN.numpy()
    assert made.scales.tolist() == [1, 1, 2.0**-7]
    assert made.codes.astype(float).tolist() == [[448, 0, -112], [-18, 0, 448], [1, 0, 224]]
    assert made.dequantize().tolist() == [[448, 0, -0.875], [-18, 0, 3.5], [1, 0, 1.75]]


@pytest.mark.parametrize("codes", FORMATS.values(), ids=FORMATS)
def test_engines_round_as_numpy_does(codes: Format) -> None:
    """A product with a diagonal of largest codes: its outputs are what the pair makes of its inputs, that many times."""
    weight = codes.largest * np.eye(WIDTH, dtype=np.float32)
    model = graph(node("MatMul", "x w", "y"), constants={"w": weight}, inputs=rows(WIDTH))
    place(model.graph, {"x": 3.0}, codes)
    x = normal(2, 40, WIDTH, seed=3) * 10.0 ** np.arange(-3, 1, 0.1, np.float32)[:40, None]
    x[0, 0, :4] = [3.0, -3.0, 400.0, -400.0]
    scale = codes.scale(3.0)
    expected = codes.encode(x / scale).astype(np.float32)
    for got in (engine(model, as_written=True, x=x)[0], engine(model, x=x)[0], reference(model, x=x)[0]):
        found = np.rint(got / scale / codes.largest * 512) / 512  # the least step of all codes is 1/512
        found = np.where((codes is INT8) & (found == -128), -127, found)  # where QuantizeLinear itself ends
        assert np.array_equal(found, expected)


def test_fp8_keeps_small_numbers_beside_a_large_one_and_int8_does_not() -> None:
    x = np.array([400.0, 0.5, 0.26], np.float32)
    lost = {
        name: np.abs(codes.encode(x / codes.scale(400.0)).astype(np.float32) * codes.scale(400.0) - x) / x
        for name, codes in FORMATS.items()
    }
    assert (lost["fp8"] <= 1 / 16 + 1e-6).all()
    assert (lost["int8"][1:] == 1).all()
