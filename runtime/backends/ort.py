"""ONNX Runtime behind three verbs: put an array where the engine reads it, bind buffers once, run.

Owns sessions, providers and IO binding. On the CPU a tensor shares its numpy array's memory, so writing the array feeds the next
run and nothing is copied; on CUDA tensors live on the device. It knows no generation and no artifact.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from txopt.runtime.backends.huge_pages import collapsed
from txopt.runtime.counts import count
from txopt.runtime.errors import ArtifactError, InputError, MissingDependencyError, TxoptError, UsageError
from txopt.runtime.opened import Opened

MOST_THREADS = 4096  # far beyond any machine; the engine starts as many as it is told, or ends the process

# Idle workers would spin on: the encoder's against the decoder's first steps, both against the caller (docs/decisions.md 13).
CONFIGURATION = {
    "session.force_spinning_stop": "1",
    # Products with weights that a graph dequantizes are of floats, and stay so where it makes MatMulNBits of them. Its default is 4.
    "session.qdq_matmulnbits_accuracy_level": "1",
}

# It takes a Relu away before a QuantizeLinear whose least code is 0, and takes float8 for such (1.32): negative numbers then pass.
DISABLED = ["ReluQuantRewrite"]

Array = NDArray[Any]
Value = Any  # onnxruntime.OrtValue: the library ships no types

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy holds such tensors as uint16
_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


class Call:
    """One set of bound buffers, run as often as wanted; inputs and outputs stay where they are."""

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Value], outputs: Mapping[str, Value]
    ) -> None:
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        try:
            self._run(self._binding)
        except Exception as err:  # the library raises a dozen kinds, without a common base
            raise TxoptError(f"the engine failed: {err}") from err


class Runner:
    """One graph, opened.

    Args:
        path: the .onnx file; its weights lie beside it.
        device: "cpu" or "cuda" ("cuda:1" for another than the first).
        threads: engine threads, None for one per core.
        as_written: the engine runs the nodes of the graph, without fusions of its own, and shares no buffer between values whose
            axes have the same names: foreign files name lengths alike that are not.
        weights: other numbers for weights that lie in the file beside the graph, by name.
        beside: the folder of the file with the weights, where it is not the graph's.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        as_written: bool = False,
        weights: Mapping[str, Array] | None = None,
        beside: Path | None = None,
    ) -> None:
        self._device, self._ordinal, providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and said once
        for key, value in CONFIGURATION.items():
            options.add_session_config_entry(key, value)
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_mem_reuse = False
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        model: str | bytes = str(path)
        if beside is not None:  # the engine looks elsewhere only for a model that it is given in memory
            model = path.read_bytes()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
        if threads is not None:
            options.intra_op_num_threads = count("threads", threads, MOST_THREADS)
        try:
            with collapsed():
                self._session = onnxruntime.InferenceSession(
                    model, options, providers=providers, disabled_optimizers=DISABLED
                )
        except Exception as err:  # the library raises a dozen kinds, without a common base
            raise ArtifactError(
                f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot open this graph (opset 24 needs 1.30 or newer): {err}"
            ) from err

    @property
    def on_host(self) -> bool:
        return self._device == "cpu"

    def describe(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """A tensor's dtype, by the name that manifests use, and its shape."""
        return _dtype(value.data_type()), tuple(value.shape())

    def opened(self) -> Opened:
        """The graph's inputs and outputs."""
        inputs, outputs = (
            {item.name: (_dtype(item.type), tuple(item.shape)) for item in items}
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )
        return Opened(inputs=inputs, outputs=outputs)

    def tensor(self, array: Array, dtype: str | None = None) -> Value:
        """An engine tensor of ``array``; on the CPU the two share memory."""
        if dtype == "bfloat16":
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, self._ordinal)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Value:
        return self.tensor(np.zeros(shape, _NUMPY[dtype]), dtype)

    def view(self, value: Value) -> Array:
        """The tensor's memory on the CPU, valid only while ``value`` lives; a copy from a device.

        A binding keeps its values and their arrays alive; the array that ``numpy()`` gives does not.
        """
        result: Array = value.numpy()
        return result

    def array(self, value: Value) -> Array:
        """The tensor's numbers, a copy that outlives it."""
        return self.view(value).copy()

    def bind(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> Call:
        return Call(self._session, inputs, outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Value]:
        """Runs once on fresh output buffers, which stay on the device; for graphs outside the token loop.

        An input of bfloat16 is given as its bits, uint16.
        """
        binding = self._session.io_binding()
        kinds = {item.name: _dtype(item.type) for item in self._session.get_inputs()}
        for name, array in inputs.items():
            array = np.asarray(array, order="C")  # which leaves scalars scalars
            # The one reading of 16 bits for which numpy has no dtype.
            narrow = array.dtype == np.uint16 and kinds.get(name) == "bfloat16"
            binding.bind_ortvalue_input(name, self.tensor(array, "bfloat16" if narrow else None))
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device, self._ordinal)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as err:  # the library raises a dozen kinds, without a common base
            raise InputError(
                f"the engine refused these inputs: expected ids and lengths that the model knows, got {_fed(inputs)}; "
                f"look for ids beyond the vocabulary and too long sources; the engine says: {err}"
            ) from err
        return dict(zip(names, binding.get_outputs(), strict=True))


def _dtype(kind: str) -> str:
    """The engine's "tensor(float)" by the name that manifests use."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return "float32" if name == "float" else name


def _fed(inputs: Mapping[str, Array]) -> str:
    """What was given, for a message."""
    described = (
        f"{name} {array.dtype} {list(array.shape)}" + (f" up to {array.max()}" if array.dtype.kind in "iu" else "")
        for name, array in inputs.items()
    )
    return ", ".join(described)


def _providers(device: str) -> tuple[str, int, list[Any]]:
    kind, _, ordinal = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind == "cpu":
        return "cpu", 0, ["CPUExecutionProvider"]
    if kind != "cuda" or not (ordinal or "0").isdecimal():
        raise UsageError(f'device must be "cpu", "cuda" or "cuda:N", got {device!r}')
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            'device="cuda" needs ONNX Runtime\'s CUDA provider, which this onnxruntime does not have: '
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    number = int(ordinal or 0)
    return "cuda", number, [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]
