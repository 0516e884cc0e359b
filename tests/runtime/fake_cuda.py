"""CUDA's runtime as cuda.bindings.runtime has it, without a GPU: memory in numpy arrays, streams as lists of what is still to do.

What it insists on, by raising Fault where the runner is wrong:
- copies and fills stay within blocks that are allocated, and go where their kind says; nothing is freed twice;
- work on a stream is done only when somebody waits for it, so what is read or overwritten too early is wrong here, too;
- a capture takes no wait, no allocation and no memory that is not pinned, and records what it takes without doing it.
``left`` says what was never freed.

What it cannot tell: whether real kernels are right or in time; errors that come up later than at the next wait; other streams,
devices and processes, for it has one stream at a time and shares memory with nobody; what a real driver thinks of alignment beyond 256
bytes, of pitches, and of threads that use it at once. Its addresses lie where no process has memory.
"""

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from threading import get_ident
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

FIRST_ADDRESS = 1 << 52
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Fault(AssertionError):
    """The runner did what a GPU would punish."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class Stream:
    """``todo`` waits for somebody who waits; ``recording`` is what a capture took, None outside of one."""

    handle: int
    todo: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    recorder: int = 0  # the thread that captures
    spoiled: bool = False

    def __int__(self) -> int:
        return self.handle


SUCCESS = cudaError_t.cudaSuccess


class FakeCuda(ModuleType):
    """The module. ``capabilities``: of its GPUs; ``broken``: the error of a machine without a driver.

    Attributes:
        mapped: its memory lies where the process has it, so that others can compute with it.
        room: bytes that may be allocated on the device. records: whether captures succeed. calls: the names of what was called.
        fails: the error that waiting gives.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaDeviceAttr = cudaDeviceAttr
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(
        self, capabilities: tuple[tuple[int, int], ...] = ((8, 9),), broken: cudaError_t | None = None
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.capabilities, self.broken = capabilities, broken
        self.room, self.records, self.fails, self.mapped = 1 << 40, True, SUCCESS, False
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.streams: dict[int, Stream] = {}
        self.graphs: set[int] = set()
        self.memory: dict[int, Bytes] = {}
        self._starts: list[int] = []
        self._host: dict[int, Bytes] = {}
        self._next = FIRST_ADDRESS

    def fault(self, text: str) -> Fault:
        """Noted as well as raised: Python only prints what is raised while objects die."""
        self.faults.append(text)
        return Fault(text)

    def left(self) -> list[str]:
        """What was never freed."""
        found = [f"device memory of {len(block)} bytes" for block in self.memory.values()]
        found += [f"pinned memory of {len(block)} bytes" for block in self._host.values()]
        return found + ["a stream"] * len(self.streams) + ["a recorded graph"] * len(self.graphs)

    # Devices

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (self.broken, None) if self.broken else (SUCCESS, len(self.capabilities))

    def cudaDeviceGetAttribute(self, attribute: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
        return SUCCESS, self.capabilities[device][attribute - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (SUCCESS if device < len(self.capabilities) else cudaError_t.cudaErrorInvalidDevice,)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (SUCCESS,)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, bytes]:
        return SUCCESS, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, bytes]:
        return SUCCESS, b"what the driver says of it"

    # Memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self.calls.append("cudaMalloc")
        if (stream := self._capturing()) is not None:
            stream.spoiled = True
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if sum(map(len, self.memory.values())) + size > self.room:
            return cudaError_t.cudaErrorMemoryAllocation, None
        block = np.full(size + 256, 0xFF, np.uint8)  # NaN in every float: nobody may count on zeros
        if self.mapped:
            address = block.ctypes.data + -block.ctypes.data % 256
            self.memory[address] = block[address - block.ctypes.data :][:size]
        else:
            address, self._next = self._next, self._next + -(-size // 256) * 256 + 256
            self.memory[address] = block[:size]
        self._starts = sorted(self.memory)
        return SUCCESS, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.calls.append("cudaFree")
        for stream in self.streams.values():
            self._do(stream)
        if self.memory.pop(address, None) is None:
            raise self.fault(f"freed at {address:#x}, where nothing is allocated")
        self._starts = sorted(self.memory)
        return (SUCCESS,)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        self.calls.append("cudaMallocHost")
        block = np.full(size, 0xFF, np.uint8)
        self._host[block.ctypes.data] = block
        return SUCCESS, block.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        if self._host.pop(address, None) is None:
            raise self.fault(f"freed at {address:#x}, where nothing is pinned")
        return (SUCCESS,)

    def at(self, address: int, size: int) -> Bytes:
        """Memory of the device, or Fault."""
        index = bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        block = self.memory.get(start)
        if block is None or address - start + size > len(block):
            raise self.fault(f"{size} bytes at {address:#x} are not allocated on the device")
        return block[address - start : address - start + size]

    def pinned(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(block) for start, block in self._host.items())

    # Copies

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: cudaMemcpyKind, stream: Stream) -> tuple[Any, ...]:
        self.calls.append("cudaMemcpyAsync")
        if kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            self.at(to, size), self.at(source, size)
            return self.put(stream, lambda: np.copyto(self.at(to, size), self.at(source, size)))
        up = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        there, here = (to, source) if up else (source, to)
        self.at(there, size)
        host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(here))
        if self.pinned(here, size):
            return self.put(
                stream, lambda: np.copyto(*((self.at(there, size), host) if up else (host, self.at(there, size))))
            )
        if stream.recording is not None:
            stream.spoiled = True
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        if up:  # read at once, as a driver does that stages it
            given = host.copy()
            return self.put(stream, lambda: np.copyto(self.at(there, size), given))
        self._do(stream)
        np.copyto(host, self.at(there, size))
        return (SUCCESS,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Stream) -> tuple[Any, ...]:
        self.at(address, size)
        return self.put(stream, lambda: self.at(address, size).fill(value))

    def make_cudaPitchedPtr(self, ptr: int, pitch: int, xsize: int, ysize: int) -> SimpleNamespace:
        return SimpleNamespace(ptr=ptr, pitch=pitch, xsize=xsize, ysize=ysize)

    def make_cudaPos(self, x: int, y: int, z: int) -> SimpleNamespace:
        return SimpleNamespace(x=x, y=y, z=z)

    def make_cudaExtent(self, width: int, height: int, depth: int) -> SimpleNamespace:
        return SimpleNamespace(width=width, height=height, depth=depth)

    def cudaMemcpy3DParms(self) -> SimpleNamespace:
        return SimpleNamespace()

    def cudaMemcpy3DAsync(self, asked: Any, stream: Stream) -> tuple[Any, ...]:
        self.calls.append("cudaMemcpy3DAsync")
        size = asked.extent

        def lines(ptr: Any, pos: Any) -> list[Bytes]:
            first = ptr.ptr + pos.y * ptr.pitch + pos.x
            if size.width + pos.x > ptr.pitch or pos.y + size.height > ptr.ysize:
                raise self.fault("a box beyond its pitch or its layer")
            return [
                self.at(first + (z * ptr.ysize + y) * ptr.pitch, size.width)
                for z in range(size.depth)
                for y in range(size.height)
            ]

        def copy() -> None:
            for to, source in zip(lines(asked.dstPtr, asked.dstPos), lines(asked.srcPtr, asked.srcPos), strict=True):
                np.copyto(to, source)

        lines(asked.dstPtr, asked.dstPos), lines(asked.srcPtr, asked.srcPos)
        return self.put(stream, copy)

    # Streams and recorded work

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = Stream(handle=0x51000 + len(self.calls) + len(self.streams))
        self.streams[int(stream)] = stream
        return SUCCESS, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        if self.streams.pop(int(stream), None) is None:
            raise self.fault("a stream destroyed twice")
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        self.calls.append("cudaStreamSynchronize")
        if stream.recording is not None:
            stream.spoiled = True
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._do(stream)
        return (self.fails,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        if stream.recording is not None:
            raise self.fault("a capture within a capture")
        stream.recording, stream.recorder, stream.spoiled = [], get_ident(), not self.records
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        recorded, stream.recording = stream.recording, None
        return (cudaError_t.cudaErrorStreamCaptureInvalidated, None) if stream.spoiled else (SUCCESS, recorded)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        self.calls.append("cudaGraphInstantiate")
        ready = SimpleNamespace(work=tuple(graph))
        self.graphs.add(id(ready))
        return SUCCESS, ready

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (SUCCESS,)

    def cudaGraphLaunch(self, ready: Any, stream: Stream) -> tuple[Any, ...]:
        self.calls.append("cudaGraphLaunch")
        if id(ready) not in self.graphs:
            raise self.fault("a graph launched that is destroyed")
        stream.todo.extend(ready.work)
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, ready: Any) -> tuple[Any, ...]:
        if id(ready) not in self.graphs:
            raise self.fault("a graph destroyed twice")
        self.graphs.remove(id(ready))
        return (SUCCESS,)

    def put(self, stream: Stream, work: Callable[[], None]) -> tuple[Any, ...]:
        """On the stream, to be done when somebody waits; or in the recording."""
        (stream.todo if stream.recording is None else stream.recording).append(work)
        return (SUCCESS,)

    def _do(self, stream: Stream) -> None:
        todo, stream.todo = stream.todo, []
        for work in todo:
            work()

    def _capturing(self) -> Stream | None:
        """What this thread captures on: others may allocate meanwhile."""
        taken = (stream for stream in self.streams.values() if stream.recording is not None)
        return next((stream for stream in taken if stream.recorder == get_ident()), None)


def installed(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    """``cuda`` in the place of cuda.bindings.runtime."""
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    for name, module in {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cuda
