"""What a figure was measured on is read off the machine."""

from txopt.benchmarks.machine import described, machine


def test_it_names_processor_and_cores() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["cpu"] in described(found)


def test_integers_that_are_unknown_are_left_out() -> None:
    assert described({"cpu": "X", "cores": 2, "integers": None}) == "2 cores of an X"
    assert described({"cpu": "X", "cores": 2, "integers": "avx2"}) == "2 cores of an X, avx2 for integers"
