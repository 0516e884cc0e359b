"""One GPU through cuda-python: memory, one stream, copies along it, and recorded work.

Owns every call of CUDA's runtime. What it gives is asynchronous unless it says otherwise: everything goes through the device's one
stream, in order, and ``wait`` ends it. It knows no engine. Source: CUDA runtime API, as cuda.bindings.runtime has it; each of its
functions returns a tuple, the error first.
"""

from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any

import numpy as np

from txopt.runtime.arrays import Array
from txopt.runtime.backends.pool import Block, Pool
from txopt.runtime.errors import DeviceMemoryError, MissingDependencyError, TxoptError, UsageError

PACKAGE = "cuda-bindings"
Box = tuple[int, int, int]  # bytes, lines, layers


def bindings() -> Any:
    """The module cuda.bindings.runtime.

    Errors:
        MissingDependencyError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise MissingDependencyError(
            f'device="tensorrt" needs {PACKAGE}, which cannot be imported ({err}): pip install {PACKAGE}'
        ) from err
    return runtime


def capability(cuda: Any, number: int, device: str = "tensorrt") -> str:
    """The compute capability of GPU ``number``, such as "SM89"; the first call to a driver, and it may say that there is none.

    Errors:
        UsageError: no driver, no GPU, or fewer of them.
    """
    error, count = cuda.cudaGetDeviceCount()
    if error or not count:
        reason = _text(cuda, error) if error else "CUDA finds no GPU"
        raise UsageError(
            f'device="{device}": expected an NVIDIA GPU and its driver, found none ({reason}); use device="cpu", or look whether '
            "nvidia-smi shows the GPU and CUDA_VISIBLE_DEVICES does not hide it"
        )
    if number >= count:
        raise UsageError(
            f'device="{device}:{number}": expected a GPU from 0 to {count - 1}, found {count} in this machine'
        )
    of = cuda.cudaDeviceAttr
    parts = (of.cudaDevAttrComputeCapabilityMajor, of.cudaDevAttrComputeCapabilityMinor)
    return "SM" + "".join(str(_checked(cuda, cuda.cudaDeviceGetAttribute(part, number))) for part in parts)


class Pinned:
    """An array in memory of the host that the device copies from and to without help; the block lives as long as the array."""

    def __init__(self, block: Block, shape: tuple[int, ...], dtype: Any) -> None:
        self._block = block
        self.__array_interface__ = {
            "data": (block.address, False),
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "version": 3,
        }


class Recorded:
    """Work that was recorded from a stream, to be run again as one call."""

    def __init__(self, cuda: Any, graph: Any) -> None:
        self._cuda, self.graph = cuda, graph

    def __del__(self) -> None:
        self._cuda.cudaGraphExecDestroy(self.graph)


class Device:
    """A GPU with a stream of its own. ``with`` it, one thread at a time talks to it.

    Errors:
        TxoptError: CUDA refuses, here and in all methods.
    """

    def __init__(self, cuda: Any, number: int) -> None:
        self._cuda, self._number = cuda, number
        self._lock = RLock()
        self._stream: Any = None
        self._checked(cuda.cudaSetDevice(number))
        self._stream = self._checked(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.stream = int(self._stream)  # its handle, for others
        self.memory, self.host_memory = (
            Pool(partial(_allocate, cuda, number, allocate), partial(_free, free))
            for allocate, free in ((cuda.cudaMalloc, cuda.cudaFree), (cuda.cudaMallocHost, cuda.cudaFreeHost))
        )

    def __enter__(self) -> "Device":
        self._lock.acquire()
        self._cuda.cudaSetDevice(self._number)  # which is each thread's own
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __del__(self) -> None:
        if self._stream is not None:
            self._cuda.cudaStreamDestroy(self._stream)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of any content; MemoryError where the system gives no more such memory."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.asarray(Pinned(self.host_memory.take(size), shape, dtype))

    def upload(self, address: int, source: int, size: int) -> None:
        """Copies from the host. Pinned memory must stay as it is until ``wait``; other memory has been read when this returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, source, size, kind, self._stream))

    def download(self, address: int, source: int, size: int) -> None:
        """Copies to the host, which has it after ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaMemcpyAsync(address, source, size, kind, self._stream))

    def copy(self, address: int, source: int, size: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, source, size, kind, self._stream))

    def clear(self, address: int, size: int) -> None:
        self._checked(self._cuda.cudaMemsetAsync(address, 0, size, self._stream))

    def copy_box(self, to: "Layout", line: int, source: "Layout", source_line: int, box: Box) -> None:
        """Copies ``box`` bytes by lines by layers, from the start of a line of one layout to that of a line of another."""
        cuda, (width, height, depth) = self._cuda, box
        asked = cuda.cudaMemcpy3DParms()
        asked.dstPtr, asked.srcPtr = to.pitched(cuda), source.pitched(cuda)
        asked.dstPos, asked.srcPos = cuda.make_cudaPos(0, line, 0), cuda.make_cudaPos(0, source_line, 0)
        asked.extent = cuda.make_cudaExtent(width, height, depth)
        asked.kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._checked(cuda.cudaMemcpy3DAsync(asked, self._stream))

    def wait(self) -> None:
        """Until everything before it is done; errors of that come up here."""
        (error,) = self._cuda.cudaStreamSynchronize(self._stream)
        if error:
            raise TxoptError(f"the GPU failed: {_text(self._cuda, error)}")

    def record(self, work: Callable[[], bool]) -> Recorded | None:
        """What ``work`` puts on the stream, recorded and not run; None where it says False, or CUDA cannot record it."""
        cuda = self._cuda
        # Other threads may allocate meanwhile.
        (error,) = cuda.cudaStreamBeginCapture(
            self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        if error:
            return self._forget()
        try:
            done = work()
        except (TxoptError, RuntimeError):  # whatever it is, the recording must end
            done = False
        error, graph = cuda.cudaStreamEndCapture(self._stream)
        if error or graph is None:
            return self._forget()
        if not done:
            cuda.cudaGraphDestroy(graph)
            return self._forget()
        error, ready = cuda.cudaGraphInstantiate(graph, 0)
        cuda.cudaGraphDestroy(graph)
        return self._forget() if error else Recorded(cuda, ready)

    def replay(self, recorded: Recorded) -> None:
        (error,) = self._cuda.cudaGraphLaunch(recorded.graph, self._stream)
        if error:
            raise TxoptError(f"the GPU failed: {_text(self._cuda, error)}")

    def _forget(self) -> Recorded | None:
        """Nothing, for a recording that was refused; its error is forgotten, for what comes next is not to blame."""
        self._cuda.cudaGetLastError()
        return None

    def _checked(self, result: tuple[Any, ...]) -> Any:
        return _checked(self._cuda, result)


class Layout:
    """Lines of ``pitch`` bytes from ``address`` on, ``lines`` of them a layer."""

    def __init__(self, address: int, pitch: int, lines: int) -> None:
        self.address, self.pitch, self.lines = address, pitch, lines

    def pitched(self, cuda: Any) -> Any:
        return cuda.make_cudaPitchedPtr(self.address, self.pitch, self.pitch, self.lines)


def _allocate(cuda: Any, number: int, allocate: Callable[[int], tuple[Any, ...]], size: int) -> int:
    cuda.cudaSetDevice(number)
    result = allocate(size)
    if result[0] == cuda.cudaError_t.cudaErrorMemoryAllocation:
        cuda.cudaGetLastError()  # forgotten: what comes next is not to blame
        raise DeviceMemoryError(
            f"the GPU has no memory left for {size:,} bytes more ({_text(cuda, result[0])}): ask for a smaller batch, fewer beams or "
            "shorter sources, or end what else runs on it"
        )
    return int(_checked(cuda, result))


def _free(free: Callable[[int], tuple[Any, ...]], address: int) -> None:
    free(address)  # whose error, at the end of a process, is that there is no CUDA any more


def _checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """What a call gave besides its error, or TxoptError."""
    error, *values = result
    if error:
        raise TxoptError(f"the GPU failed: {_text(cuda, error)}")
    return values[0] if values else None


def _text(cuda: Any, error: Any) -> str:
    """CUDA's name of an error and what it says of it."""
    name, text = cuda.cudaGetErrorName(error)[1], cuda.cudaGetErrorString(error)[1]
    return f"{name.decode()}: {text.decode()}"
