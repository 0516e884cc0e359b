"""TensorRT's builders behind one class: a lowered .onnx file in, a plan and a count of its layers out.

Owns every call of TensorRT 10.16 and 11 (``tensorrt``) and TensorRT-RTX (``tensorrt_rtx``), whose Python interfaces differ by a few
names; which is which is data (MANNERS, and LIBRARIES of runtime/engines.py). TensorRT-RTX builds for named GPUs and needs none, nor a
driver; TensorRT builds for the GPU of the machine. A warning of the parser is an error here: so it says that it drops an input. Knows
no artifact.
"""

import ctypes
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt.runtime.backends.trt_log import log_of
from txopt.runtime.converters import convert_fields, flag
from txopt.runtime.engines import LIBRARIES, Profile
from txopt.runtime.errors import MissingDependencyError, TxoptError, UsageError, explain

HOW_TO_NAME = "where nvidia-smi --query-gpu=compute_cap --format=csv says 8.9, it is --capability SM89"
WRONG_OPTIONS = "options of engines that cannot work:"
_NO_KERNEL = "not supported by a dedicated kernel"
_FLOATS = ("FLOAT", "HALF", "BF16")
_MOST_LINES = 8
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, kw_only=True)
class Manner:
    """What differs between the libraries' builders.

    Attributes:
        refused: options that it does not have, and what to do instead.
        needs_gpu: whether it builds for the GPU of the machine and no other.
    """

    refused: Mapping[str, str]
    needs_gpu: bool


MANNERS = {
    "tensorrt": Manner(refused={}, needs_gpu=True),
    "tensorrt-rtx": Manner(
        refused={
            "any_version": "its plans are of one version; build again after an upgrade",
            "any_hardware": "name every GPU instead: --capability SM80,SM89,SM120",
            "refit": "its builder needs a CUDA driver for that; build again with the new weights",
        },
        needs_gpu=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Options of a build that are on or off.

    Raises:
        UsageError: values that are neither, all of them listed.
    """

    any_version: bool = False
    any_hardware: bool = False
    weight_streaming: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        convert_fields(self, {field.name: flag for field in fields(self)}, WRONG_OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plan.

    Attributes:
        layers: of its network, by kind.
        float_casts: those of its casts that are between float types and of more than one number.
        apart: those of its attentions that have no kernel of their own, and become products and a softmax.
    """

    plan: bytes
    layers: Mapping[str, int]
    float_casts: int
    apart: int


Progress = Callable[[int, int], None]  # (done, total) steps


class Engine:
    """The builder of one library, for some GPUs.

    Args:
        runtime: a key of LIBRARIES.
        capabilities: GPUs, such as "SM89".

    Raises:
        UsageError: an option that the library does not have, or a GPU that it does not build for.
        MissingDependencyError: it is not installed, or, where it builds for the machine's GPU, there is none.
    """

    def __init__(self, runtime: str, capabilities: Sequence[str], switches: Switches) -> None:
        if runtime not in LIBRARIES:
            raise UsageError(f"runtime: expected one of {', '.join(LIBRARIES)}, got {runtime!r}")
        self._library, self._manner, self._switches = LIBRARIES[runtime], MANNERS[runtime], switches
        refused = [
            f"{name.replace('_', '-')}: {why}" for name, why in self._manner.refused.items() if getattr(switches, name)
        ]
        if refused:
            raise UsageError(explain(f"{runtime} does not have these options:", refused))
        self._trt = _module(runtime)
        self.version: str = self._trt.__version__
        self.capabilities = self._checked(runtime, capabilities)

    def build(
        self, file: Path, profiles: Sequence[Profile], progress: Progress, *, timing: bytes | None = None
    ) -> tuple[Built, bytes | None]:
        """The plan of a lowered graph, and what timing the library wants to keep; ``timing`` is what it kept before.

        Args:
            file: .onnx, its weights beside it.

        Raises:
            UsageError: the library does not take the graph; the message names nodes. KeyboardInterrupt: the user's.
        """
        trt, log = self._trt, log_of(self._trt)
        log.forget()
        builder = trt.Builder(log)
        network = builder.create_network(_typed(trt))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(file)) or log.heard:
            errors = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
            raise self._refusal(file, "parse", errors or log.heard)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        if dropped := _dropped(network, layers):
            raise self._refusal(file, "parse", [f"the input {name} is dropped" for name in dropped])
        apart = _take_apart(trt, layers, [trt.DataType.FLOAT])
        config = self._config(builder)
        _add_profiles(builder, network, config, profiles)
        with _interruptible() as stopped:
            config.progress_monitor = monitor = _monitor(trt)(progress, stopped)
            kept = self._timing(config, timing)
            plan = builder.build_serialized_network(network, config)
            if plan is None and _NO_KERNEL in "".join(log.heard):
                log.forget()
                apart = _take_apart(trt, layers, [trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16])
                plan = builder.build_serialized_network(network, config)
        if monitor.failed is not None:
            raise monitor.failed
        if plan is None and stopped:  # by a signal whose handler did not raise
            raise TxoptError(f"building was stopped by {signal.Signals(stopped[0]).name}")
        if plan is None or log.heard:
            raise self._refusal(file, "build", log.heard)
        counted = Counter(layer.type.name for layer in layers)
        casts = sum(_casts_floats(trt, layer) for layer in layers)
        built = Built(
            plan=bytes(memoryview(plan)), layers=dict(sorted(counted.items())), float_casts=casts, apart=apart
        )
        return built, bytes(memoryview(config.get_timing_cache().serialize())) if kept else None

    def _checked(self, runtime: str, capabilities: Sequence[str]) -> tuple[str, ...]:
        if self._manner.needs_gpu:
            found = _gpu(self._library.package)
            if list(capabilities) not in ([], [found]):
                raise UsageError(
                    f"capability: {runtime} builds for this machine's GPU, which is {found}, got {', '.join(capabilities)}; leave it "
                    "out, or build with --runtime tensorrt-rtx"
                )
            return (found,)
        known = [name for name in dir(self._trt.ComputeCapability) if name.startswith("SM")]
        if not capabilities or (wrong := [name for name in capabilities if name not in known]):
            got = ", ".join(ascii(name)[1:-1] for name in wrong) if capabilities else "none"
            among = ", ".join(sorted(known, key=lambda name: int(name[2:])))
            raise UsageError(
                f"capability: expected GPUs among {among}, got {got}; {HOW_TO_NAME}; {runtime} {self.version} builds for no "
                "others, but --runtime tensorrt does, for the GPU of its machine"
            )
        return tuple(dict.fromkeys(capabilities))

    def _config(self, builder: Any) -> Any:
        trt, config = self._trt, builder.create_builder_config()
        if not self._manner.needs_gpu:
            config.num_compute_capabilities = len(self.capabilities)
            for index, name in enumerate(self.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        flags = {"any_version": "VERSION_COMPATIBLE", "weight_streaming": "WEIGHT_STREAMING", "refit": "REFIT"}
        for name, member in flags.items():
            if getattr(self._switches, name):
                config.set_flag(getattr(trt.BuilderFlag, member))
        if self._switches.any_hardware:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return config

    def _timing(self, config: Any, before: bytes | None) -> bool:
        """Whether the library times kernels, and keeps what it measured; TensorRT-RTX does so where plans run."""
        return self._manner.needs_gpu and config.set_timing_cache(config.create_timing_cache(before or b""), False)

    def _refusal(self, file: Path, verb: str, said: Sequence[str]) -> UsageError:
        names = {node.name for node in ir.load(file).graph.all_nodes() if node.name}
        told = "\n".join(said)
        nodes = sorted((name for name in names if name in told), key=len, reverse=True)[:3]
        where = f" (node {', '.join(nodes)})" if nodes else ""
        problems = [line for line in dict.fromkeys(told.splitlines()) if line.strip()][:_MOST_LINES]
        advice = _advice(told, self.capabilities)
        return UsageError(
            explain(
                f"{self._library.modules[0]} {self.version} does not {verb} {file.stem}{where}; {advice}. It says:",
                problems or ["nothing"],
            )
        )


def _advice(told: str, capabilities: Sequence[str]) -> str:
    """What to try, by what the library says."""
    if "not supported" in told.lower() and "SM75" in capabilities:
        return "SM75 builds float16 alone, without islands in float32 (T5 has some): export in fp16, or leave SM75 out"
    if "memory" in told.lower():
        return "make --max-batch, --max-source or --cache-length smaller, or build on a machine with more memory"
    if "Attention" in told:
        return "this attention has no kernel; export in fp16 or bf16, where head sizes up to 256 have one"
    if "profile" in told.lower() or "shape" in told.lower():
        return "look at the ranges that --dry-run prints, and give others"
    return "export in another precision, or tell us with the model's name"


@cache
def _module(runtime: str) -> Any:
    """The library's module.

    Raises:
        MissingDependencyError: there is none, or its shared libraries are missing.
    """
    library, problems = LIBRARIES[runtime], []
    for name in library.modules:
        try:
            return import_module(name)
        except ImportError as err:
            problems.append(f"{name}: {err}")
    raise MissingDependencyError(
        explain(f"engines for {runtime} need {library.package}: pip install {library.package}; found:", problems)
    )


@cache
def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Adds up the steps of all phases; says no to the next one once the user wants to stop, or progress cannot be shown."""

        def __init__(self, progress: Progress, stopped: list[int]) -> None:
            super().__init__()
            self._progress, self._stopped, self._done, self._total = progress, stopped, 0, 0
            self.failed: Exception | None = None

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self._total += num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._done += 1
            try:
                self._progress(min(self._done, self._total), self._total)
            except Exception as err:  # it must not pass through C++
                self.failed = err
            return not self._stopped and self.failed is None

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Signals wait while C++ builds, where an exception would end the process; they are sent again afterwards."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: stopped.append(number))
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for sent in stopped[:1]:
            signal.raise_signal(sent)


def _dropped(network: Any, layers: Sequence[Any]) -> list[str]:
    """Inputs that no layer reads: not every one that the parser drops comes with a warning, and the builder may crash on them."""
    read = {
        layer.get_input(index).name for layer in layers for index in range(layer.num_inputs) if layer.get_input(index)
    }
    return [name for index in range(network.num_inputs) if (name := network.get_input(index).name) not in read]


def _typed(trt: Any) -> int:
    """TensorRT 10 takes types from the graph where it is told to; later ones always do."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _take_apart(trt: Any, layers: Sequence[Any], kinds: Sequence[Any]) -> int:
    """Lets Attention of these types become products and a softmax, where there is no kernel for it; how many there are."""
    found = 0
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_OUTPUT and layer.get_output(0).dtype in kinds:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
            found += 1
    return found


def _casts_floats(trt: Any, layer: Any) -> bool:
    if layer.type != trt.LayerType.CAST:
        return False
    kinds = {layer.get_input(0).dtype.name, layer.get_output(0).dtype.name}
    varies = -1 in layer.get_output(0).shape
    return varies and len(kinds) == 2 and kinds <= set(_FLOATS)


def _add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[Profile]) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for profile in profiles:
        made = builder.create_optimization_profile()
        for tensor in inputs:
            letters = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
            if -1 in tensor.shape:
                made.set_shape(
                    tensor.name,
                    *(
                        tuple(
                            profile.axes[letter][place] if size == -1 else size
                            for letter, size in zip(letters, tensor.shape, strict=True)
                        )
                        for place in range(3)
                    ),
                )
        if config.add_optimization_profile(made) < 0:
            raise TxoptError(f"the library refuses the profile {profile.name}: {profile.to_json()}")


def _told(error: Any) -> str:
    where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _gpu(package: str) -> str:
    """The capability of the machine's first GPU, such as "SM89".

    Raises:
        MissingDependencyError: there is no driver, or no GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        parts, device = (ctypes.c_int(), ctypes.c_int()), ctypes.c_int()
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        for part, attribute in zip(parts, (_MAJOR, _MINOR), strict=True):
            failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    except OSError:
        failed = True
    if failed:
        raise MissingDependencyError(
            f"{package} builds for the GPU of the machine, and there is none, or no driver for it; build with --runtime tensorrt-rtx, "
            "which needs neither"
        )
    return f"SM{parts[0].value}{parts[1].value}"
