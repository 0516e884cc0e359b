"""What exporter/engine.py asks of libraries is there: in TensorRT-RTX itself, and in the wheels of TensorRT 10.16 and 11.4."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.data.make_tensorrt_differences import names_of
from txopt.exporter import engine

pytestmark = pytest.mark.tensorrt

ABSENT = json.loads((Path(__file__).parents[1] / "data/tensorrt_differences.json").read_text("utf-8"))
OF_RTX_ALONE = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
_LIBRARYS = re.compile(r"(self\._trt|trt|builder|network|parser|config|layer|tensor|made|error)\b.*")


def asked() -> set[str]:
    """Attributes of the library's module and of its objects, and the names of flags."""
    tree = ast.parse(Path(engine.__file__).read_text("utf-8"))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _LIBRARYS.fullmatch(ast.unparse(node.value))
    }
    flags = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z]+(_[A-Z]+)+", node.value)
    }
    return {name for name in attributes | flags if not name.startswith("_")}


def test_the_source_is_read() -> None:
    assert {
        "parse_from_file",
        "add_optimization_profile",
        "decomposable",
        "VERSION_COMPATIBLE",
        "STRONGLY_TYPED",
    } <= asked()


def test_tensorrt_rtx_has_it() -> None:
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra test brings TensorRT-RTX for Linux on x86-64")
    assert not asked() - names_of(rtx)


@pytest.mark.parametrize("version", ABSENT)
def test_tensorrt_has_it_but_for_what_names_gpus(version: str) -> None:
    """It builds for the GPU of the machine."""
    assert asked() & set(ABSENT[version]) == OF_RTX_ALONE
