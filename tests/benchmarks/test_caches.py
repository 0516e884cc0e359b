"""What ONNX Runtime's CPU does with K/V caches in int8: docs/quantization.md says so, and is to change when this fails."""

from txopt.benchmarks.caches import SPELLINGS, measure, taken


def test_operators_that_take_codes() -> None:
    found = taken()
    assert found.pop("TensorScatter of int8") == "runs"
    assert found.keys() == {"TensorScatter of float8e4m3fn", "Attention with K and V of int8"}
    assert "Could not find an implementation" in found["TensorScatter of float8e4m3fn"]
    assert (
        "Type 'tensor(int8)' of input parameter (k) of operator (Attention)" in found["Attention with K and V of int8"]
    )


def test_every_spelling_says_the_same_over_a_quarter_of_the_bytes() -> None:
    """measure() compares the answers before it times them."""
    found = measure(2, 24, threads=1)
    assert found.keys() == SPELLINGS.keys()
    size = {name: row["cache_bytes"] for name, row in found.items()}
    assert size["Attention, float32"] == 2 * 2 * 8 * 24 * 64 * 4
    assert size["GroupQueryAttention, int8"] * 4 == size["GroupQueryAttention, float32"]
