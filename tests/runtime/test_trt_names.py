"""What the runner asks of cuda-python and TensorRT is there in the real packages, and answers as the fakes do without a driver.

Nothing here needs a GPU, and nothing is run on one.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.runtime.fake_cuda import FakeCuda, cudaError_t
from tests.runtime.planned import planned
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends import cuda as cuda_module
from txopt.runtime.errors import UsageError
from txopt.runtime.model import load

BACKENDS = Path(cuda_module.__file__).parent


@pytest.fixture(scope="module")
def real() -> Any:
    return pytest.importorskip(
        "cuda.bindings.runtime", reason="the extra test brings cuda-bindings for Linux on x86-64"
    )


@pytest.fixture(scope="module")
def tensorrt() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="the extra test brings TensorRT-RTX for Linux on x86-64")


def attributes(file: str, of: str) -> set[str]:
    """Attributes that the source asks of names that match ``of``."""
    tree = ast.parse((BACKENDS / file).read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(of, ast.unparse(node.value))
    }


CUDA_NAMES = sorted(attributes("cuda.py", r"(self\._)?cuda"))


def test_engines_need_no_onnx_runtime() -> None:
    code = (
        "import sys, txopt.runtime.model, txopt.runtime.backends.trt; print({'onnxruntime', 'cuda'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_source_is_read() -> None:
    assert {"cudaMalloc", "cudaMemcpy3DAsync", "cudaStreamEndCapture", "cudaMemcpyKind", "make_cudaPos"} <= set(
        CUDA_NAMES
    )


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_cuda_has_it_and_so_has_the_fake(name: str, real: Any) -> None:
    assert hasattr(real, name)
    assert hasattr(FakeCuda(), name)


@pytest.mark.parametrize("enum", ["cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode"])
def test_the_fakes_numbers_are_cudas(enum: str, real: Any) -> None:
    for member in getattr(FakeCuda, enum):
        assert int(getattr(getattr(real, enum), member.name)) == member.value


def test_errors_come_first_and_are_true(real: Any) -> None:
    """The runner takes an error for one by its truth, and the rest of a failed answer for nothing."""
    assert not real.cudaError_t.cudaSuccess
    assert real.cudaError_t.cudaErrorInsufficientDriver
    assert real.cudaGetErrorName(real.cudaError_t.cudaErrorInsufficientDriver)[1] == b"cudaErrorInsufficientDriver"


# In a process of its own: where there is a GPU, it is hidden before CUDA looks.
LOOK = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from cuda.bindings import runtime as cuda
error, count = cuda.cudaGetDeviceCount()
print(error.name, count, *map(len, (cuda.cudaMalloc(512), cuda.cudaFree(0), cuda.cudaStreamCreateWithFlags(1))))
"""


def test_without_a_gpu_cuda_answers_as_the_fake(real: Any) -> None:
    said = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=60, check=True).stdout
    name, count, *lengths = said.split()
    assert name in {"cudaErrorInsufficientDriver", "cudaErrorNoDevice"}
    assert name in cudaError_t.__members__
    assert (count, lengths) == ("None", ["2", "1", "2"])
    fake = FakeCuda(broken=cudaError_t[name])
    assert fake.cudaGetDeviceCount() == (cudaError_t[name], None)


def test_a_machine_without_a_gpu_is_told_by_the_real_package(real: Any) -> None:
    error, count = real.cudaGetDeviceCount()
    if not error and count:
        assert re.fullmatch(r"SM\d{2,3}", cuda_module.capability(real, 0))
        return
    with pytest.raises(UsageError, match=r"an NVIDIA GPU and its driver, found none \((cudaError|CUDA finds)"):
        cuda_module.capability(real, 0)


@pytest.mark.tensorrt
def test_the_real_libraries_are_left_alone_where_nothing_fits(
    real: Any, tensorrt: ModuleType, g2p: Artifact, tmp_path: Path
) -> None:
    """Without a driver they would end the process; with one, these engines are of a version that there is not."""
    artifact = planned(g2p, tmp_path / "out", version="0.1")
    with pytest.raises(
        UsageError, match=r"an NVIDIA GPU and its driver, found none|no engine of this|of another version"
    ):
        load(artifact.path, device="tensorrt")


def test_a_box_is_asked_for_as_cuda_reads_it(real: Any) -> None:
    """The parts of a description are copied when they are given, so each is made before."""
    asked = real.cudaMemcpy3DParms()
    asked.dstPtr = real.make_cudaPitchedPtr(4096, 64, 64, 8)
    asked.dstPos = real.make_cudaPos(0, 3, 0)
    asked.extent = real.make_cudaExtent(16, 2, 5)
    asked.kind = real.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    assert (asked.dstPtr.ptr, asked.dstPtr.pitch, asked.dstPtr.ysize) == (4096, 64, 8)
    assert (asked.dstPos.y, asked.extent.width, asked.extent.height, asked.extent.depth) == (3, 16, 2, 5)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("file", "of", "kind"),
    [
        ("plan.py", r"(self\._)?engine", "ICudaEngine"),
        ("plan.py", r"self\._context", "IExecutionContext"),
        ("plan.py", "made", "IExecutionContext"),
        ("trt.py", "engine", "ICudaEngine"),
        ("trt.py", "runtime", "Runtime"),
    ],
)
def test_tensorrt_has_what_is_asked_of_its_objects(file: str, of: str, kind: str, tensorrt: Any) -> None:
    asked = attributes(file, of)
    if of == r"self\._context":  # as our own Context is called in a Call
        asked -= {"set_up", "run", "shapes"}
    assert asked
    assert [name for name in sorted(asked) if not hasattr(getattr(tensorrt, kind), name)] == []


@pytest.mark.tensorrt
def test_tensorrt_has_what_is_asked_of_its_module(tensorrt: Any) -> None:
    asked = attributes("trt.py", "library") | attributes("trt_log.py", "library")
    assert {"Runtime", "ILogger", "__version__"} <= asked
    assert [name for name in sorted(asked) if not hasattr(tensorrt, name)] == []
    assert tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert (
        tensorrt.ILogger.Severity.INTERNAL_ERROR <= tensorrt.ILogger.Severity.ERROR < tensorrt.ILogger.Severity.WARNING
    )
    assert hasattr(tensorrt.IExecutionContext, "is_stream_capturable")  # the runner does without where there is none


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("Runtime", "deserialize_cuda_engine", "serialized_engine: typing_extensions.Buffer"),
        ("ICudaEngine", "create_execution_context", "strategy: "),
        ("ICudaEngine", "get_aliased_input_tensor", "name: str) -> str"),
        (
            "IExecutionContext",
            "set_optimization_profile_async",
            "profile_index: typing.SupportsInt, stream_handle: typing.SupportsInt",
        ),
        ("IExecutionContext", "set_input_shape", "name: str, shape: tuple) -> bool"),
        ("IExecutionContext", "set_tensor_address", "name: str, memory: typing.SupportsInt) -> bool"),
        ("IExecutionContext", "execute_async_v3", "stream_handle: typing.SupportsInt) -> bool"),
        ("IExecutionContext", "infer_shapes", ") -> list[str]"),
        ("IExecutionContext", "is_stream_capturable", "stream: typing.SupportsInt) -> bool"),
    ],
)
def test_tensorrt_takes_what_it_is_given(kind: str, name: str, arguments: str, tensorrt: Any) -> None:
    assert arguments in getattr(getattr(tensorrt, kind), name).__doc__


@pytest.mark.tensorrt
def test_types_of_numbers_have_the_names_that_are_looked_up(tensorrt: Any) -> None:
    from tests.runtime.fake_tensorrt import NAMES
    from txopt.runtime.backends.plan import _DTYPES

    assert set(_DTYPES) <= set(tensorrt.DataType.__members__)
    assert {name: _DTYPES[kind] for name, kind in NAMES.items()} == {name: name for name in NAMES}
    assert "INPUT" in tensorrt.TensorIOMode.__members__
