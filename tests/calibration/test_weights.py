"""The one entry: every method, what it asks for, and how fast rounding is."""

import time

import numpy as np
import pytest

from tests.calibration.made import SCHEMES, correlated, normal
from txopt.calibration.blocks import BlockScheme, dequantize
from txopt.calibration.moments import output_errors, second_moments
from txopt.calibration.weights import Method, quantize
from txopt.runtime.errors import SourceError, UsageError


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_method_gives_blocks_of_the_scheme_whose_outputs_are_near(method: Method, scheme: BlockScheme) -> None:
    weight = normal(100, 12)
    moments = second_moments(correlated(500, 100))
    blocks = quantize(weight, scheme, method, moments=moments)
    assert blocks.scheme == scheme
    assert blocks.scales.min() > 0
    lost = output_errors(dequantize(blocks) - weight, moments).sum() / output_errors(weight, moments).sum()
    assert lost < {4: 0.2, 8: 0.02}[scheme.bits] ** 2


@pytest.mark.parametrize("method", [Method.GPTQ, Method.DESCENT])
def test_some_methods_need_calibration_data(method: Method) -> None:
    with pytest.raises(UsageError, match=f"weight lm_head: {method} needs calibration data, got none"):
        quantize(normal(16, 2), BlockScheme(), method, name="lm_head")


@pytest.mark.parametrize("method", Method)
def test_every_method_refuses_numbers_that_are_not_finite_by_name(method: Method) -> None:
    weight = normal(16, 2)
    weight[3, 1] = np.nan
    with pytest.raises(SourceError, match=r"weight lm_head: expected finite numbers, .* at \[3,1\]"):
        quantize(weight, BlockScheme(), method, moments=np.eye(16), name="lm_head")


def test_rounding_ten_million_numbers_takes_less_than_a_second() -> None:
    weight = normal(1024, 10_000)
    start = time.process_time()
    quantize(weight, BlockScheme(bits=4, block=32))
    assert time.process_time() - start < 1
