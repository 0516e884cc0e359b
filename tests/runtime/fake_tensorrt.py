"""TensorRT's runtime as the runner uses it, without a GPU: a plan names an ONNX graph, which ONNX Runtime runs on the CPU.

What it insists on, by raising Fault where the runner is wrong: a driver is there before a plan is seen; shapes lie within the profile
that is set; every tensor has an address on the device, aligned, with room for it; an aliased output lies where its input does, and
another overlaps no input; a context has run as it is set up before it is recorded, and is left alone while the recording is replayed.

What it cannot tell: whether a plan computes what its graph does, how fast, in which precision (it computes in the graph's own and
rounds at the borders), what a real library refuses, and how much memory a context takes. Shapes of outputs are made of lengths of
inputs only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from tests.runtime.fake_cuda import FakeCuda, Fault
from txopt.runtime.backends.tensors import STORED
from txopt.runtime.engines import Plan
from txopt.runtime.graphs import TensorSpec

Array = np.ndarray[Any, Any]
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "bool": "BOOL"}


class Crash(BaseException):
    """The process would end here."""


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


def plan_bytes(plan: Plan, *, onnx: str | None, version: str, aliases: bool = True) -> bytes:
    """A plan file of the fake; without ``onnx`` it computes nothing."""
    return json.dumps({"plan": plan.to_json(), "onnx": onnx, "version": version, "aliases": aliases}).encode()


@cache
def session(onnx: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # it says of every cache that it is copied
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


class FakeTensorRT(ModuleType):
    """The module. ``compiling``: how often a context says that it cannot be recorded yet."""

    ILogger = ILogger
    ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")

    def __init__(self, cuda: FakeCuda, version: str = "1.7.1", compiling: int = 0) -> None:
        super().__init__("fake_tensorrt")
        self.__version__, self.cuda, self.compiling = version, cuda, compiling
        self.ran: list[str] = []  # the names of profiles
        self.overflows_after: int | None = None  # runs of a decoder, whose logits are NaN from then on
        self.on_host: set[str] = set()  # tensors that engines want there
        self.seen: list[bytes] = []  # plans

    def Runtime(self, logger: ILogger) -> "Runtime":
        return Runtime(self, logger)


class Runtime:
    def __init__(self, library: FakeTensorRT, logger: ILogger) -> None:
        self._library, self._logger = library, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
        if self._library.cuda.broken or not self._library.cuda.capabilities:
            raise Crash("a plan without a driver")
        self._library.seen.append(data)
        try:
            document = json.loads(data)
        except ValueError:
            self._logger.log(Severity.INFO, "reading")
            self._logger.log(Severity.ERROR, "magic tag does not match")
            return None
        return Engine(self._library, document)


class Engine:
    def __init__(self, library: FakeTensorRT, document: Mapping[str, Any]) -> None:
        self.library, problems = library, list[str]()
        self.plan = Plan.from_json(document["plan"], "plan", problems)
        assert not problems, problems
        self.onnx, self.aliases = document["onnx"], document["aliases"]
        self.tensors = {item.name: item for item in (*self.plan.inputs, *self.plan.outputs)}
        self.inputs = {item.name for item in self.plan.inputs}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(self.plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.tensors[name].axes)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=NAMES[self.tensors[name].dtype])

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="HOST" if name in self.library.on_host else "DEVICE")

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present_", "self_") if self.aliases and name.startswith("present_") else None

    def create_execution_context(self, strategy: str) -> "Context":
        assert strategy == FakeTensorRT.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return Context(self)


@dataclass
class _Bound:
    """What an enqueue runs with: addresses and shapes by name."""

    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._cuda = engine, engine.library.cuda
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._setting, self._ran_at = 0, -1  # a number that grows with every change, and that of the last run
        self._compiling, self._cleared = engine.library.compiling, False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self._engine.num_optimization_profiles or stream not in self._cuda.streams:
            return False
        self._profile, self._setting = index, self._setting + 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert type(shape) is tuple
        assert all(type(size) is int for size in shape)
        item, profile = self._engine.tensors[name], self._engine.plan.profiles[self._profiled()]
        self._setting += 1
        for axis, size in zip(item.axes, shape, strict=True):
            least, _, most = (axis, axis, axis) if isinstance(axis, int) else profile.axes[axis]
            if not least <= size <= most:
                raise self._cuda.fault(f"{name} {shape} is beyond profile {profile.name}")
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self._engine.inputs - self._shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = {
            axis: size
            for item in self._engine.plan.inputs
            for axis, size in zip(item.axes, self._shapes[item.name], strict=True)
        }
        return tuple(axis if isinstance(axis, int) else lengths[axis] for axis in self._engine.tensors[name].axes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256:
            return False
        self._addresses[name], self._setting = address, self._setting + 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self._compiling -= 1
        return self._compiling < 0

    def execute_async_v3(self, handle: int) -> bool:
        if type(handle) is not int or handle not in self._cuda.streams:
            raise self._cuda.fault(f"{handle!r} is no stream")
        stream = self._cuda.streams[handle]
        missing = self._engine.tensors.keys() - self._addresses.keys()
        if missing:
            raise self._cuda.fault(f"no address for {sorted(missing)}")
        shapes = {name: self.get_tensor_shape(name) for name in self._engine.tensors}
        self._check_memory(shapes)
        setting, bound = self._setting, _Bound(dict(self._addresses), shapes)
        if stream.recording is None:
            self._cuda.put(stream, lambda: self._run(bound))
            self._ran_at = setting
            return True
        if self._ran_at != setting:
            raise self._cuda.fault("recorded before it has run with these shapes and addresses")

        def replay() -> None:
            if self._setting != setting:
                raise self._cuda.fault("replayed after its context was set up otherwise")
            self._run(bound)

        self._cuda.put(stream, replay)
        return True

    def _profiled(self) -> int:
        if self._profile is None:
            raise self._cuda.fault("no profile is set")
        return self._profile

    def _check_memory(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        ranges = {}
        for name, item in self._engine.tensors.items():
            size = int(np.prod(shapes[name])) * np.dtype(STORED[item.dtype]).itemsize
            self._cuda.at(self._addresses[name], size)
            ranges[name] = (self._addresses[name], self._addresses[name] + size)
        for name in self._engine.tensors.keys() - self._engine.inputs:
            alias = self._engine.get_aliased_input_tensor(name)
            start, end = ranges[name]
            for other in self._engine.inputs:
                if other == alias and ranges[other] != ranges[name]:
                    raise self._cuda.fault(f"{name} is aliased with {alias} and lies elsewhere")
                if other != alias and ranges[other][0] < end and start < ranges[other][1]:
                    raise self._cuda.fault(f"{name} overlaps {other}")

    def _run(self, bound: _Bound) -> None:
        self._engine.library.ran.append(self._engine.plan.profiles[self._profiled()].name)
        if self._engine.onnx is None:  # nothing is computed: the outputs are zeros, from the first run on
            if not self._cleared:
                self._cleared = True
                for spec in self._engine.plan.outputs:
                    self._view(spec, bound)[...] = 0
            return
        runner = session(self._engine.onnx)
        feeds = {}
        for item in runner.get_inputs():
            spec = self._engine.tensors[item.name]
            feeds[item.name] = _widened(self._view(spec, bound), spec.dtype, item.type)
        names = [item.name for item in runner.get_outputs()]
        results = dict(zip(names, runner.run(names, feeds), strict=True))
        limit = self._engine.library.overflows_after
        if limit is not None and "logits" in results and len(self._engine.library.ran) > limit:
            results["logits"][...] = np.nan
        if "next" in self._engine.tensors:
            results |= _found(results["logits"][:, -1], self._engine.tensors["top_ids"].axes[1])
        for spec in self._engine.plan.outputs:
            self._view(spec, bound)[...] = _narrowed(results[spec.name], spec.dtype)

    def _view(self, item: TensorSpec, bound: _Bound) -> Array:
        kind, shape = np.dtype(STORED[item.dtype]), bound.shapes[item.name]
        return self._cuda.at(bound.addresses[item.name], int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)


def _found(logits: Array, most: Any) -> dict[str, Array]:
    """What a decoder looks for in its own logits; equals in the order that numpy happens to leave them."""
    order = np.argsort(-logits, axis=1)[:, :most]
    total = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    values = np.take_along_axis(logits, order, axis=1)
    return {"next": logits.argmax(-1), "top_values": values, "top_ids": order, "log_sum": total}


def _widened(array: Array, dtype: str, wanted: str) -> Array:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return array.astype(kinds.get(wanted, array.dtype))


def _narrowed(array: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return ((array.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return array.astype(STORED[dtype])


__all__ = ["Crash", "FakeTensorRT", "Fault", "plan_bytes"]
