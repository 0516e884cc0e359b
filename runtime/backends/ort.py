"""ONNX Runtime behind the verbs of runner.py: put an array where the engine reads it, bind buffers once, run.

Owns sessions, providers and IO binding. On the CPU a tensor shares its numpy array's memory, so writing the array feeds the next
run and nothing is copied. On CUDA tensors live on the device, at one address for as long as they live; with cuda-bindings, rows of the
self-attention cache move and grow there, else through the host. Calls that are run again and again may be CUDA graphs (captures.py).
It knows no generation.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from txopt.runtime.backends import cuda, tensors
from txopt.runtime.backends.captures import RECORDING, Captures
from txopt.runtime.backends.ort_session import GRAPHS, Place, open_session, session_options
from txopt.runtime.decoder import Ids
from txopt.runtime.errors import InputError, MissingDependencyError, TxoptError
from txopt.runtime.opened import Opened

Array = NDArray[Any]
Value = Any  # onnxruntime.OrtValue: the library ships no types

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy holds such tensors as uint16
_KINDS = {**tensors.STORED, "bfloat16": _BFLOAT16}  # for bindings by address


class Staged:
    """See runner.Staged. ``shared``: the engine's value is the array's own memory."""

    def __init__(self, array: Array, value: Value, shared: bool) -> None:
        self.array, self.value, self.shared = array, value, shared

    def write(self) -> None:
        """Lets the engine have what is in ``array``."""
        self.value.update_inplace(self.array)

    def read(self) -> Array:
        if not self.shared:
            self.array[...] = self.value.numpy()
        return self.array


class Call:
    """See runner.Call. ``where`` tensors given by address are; ``gpu`` is what else works on them."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        where: tuple[str, int],
        inputs: Mapping[str, Value | Staged],
        outputs: Mapping[str, Value | Staged],
        reads: Sequence[Staged],
        gpu: cuda.Device | None = None,
        captures: Captures | None = None,
    ) -> None:
        self._run, self._gpu, self._captures, self._again = session.run_with_iobinding, gpu, captures, False
        self._binding = session.io_binding()
        self._writes = [item for item in inputs.values() if isinstance(item, Staged) and not item.shared]
        self._reads = [item for item in reads if not item.shared]
        by_value, by_address = self._binding.bind_ortvalue_input, self._binding.bind_input
        for items in (inputs, outputs):
            for name, item in items.items():
                if isinstance(item, tensors.Tensor):
                    by_address(name, *where, _KINDS[item.dtype], item.shape, item.address)
                else:
                    by_value(name, item.value if isinstance(item, Staged) else item)
            by_value, by_address = self._binding.bind_ortvalue_output, self._binding.bind_output
        if captures is not None:
            self._bound = tuple(_place(name, item) for items in (inputs, outputs) for name, item in items.items())

    def run(self) -> None:
        for staged in self._writes:
            staged.write()
        if self._gpu is not None:
            self._gpu.wait()  # for rows that move: the engine has another stream
        try:
            if self._captures is None:
                self._run(self._binding)
            else:
                with RECORDING:
                    self._run(self._binding, self._captures.options(self._bound, again=self._again))
        except Exception as err:  # the library raises a dozen kinds, without a common base
            advice = "" if self._captures is None else '; device="cuda" runs it without recording'
            raise TxoptError(f"the engine failed: {err}{advice}") from err
        self._again = True
        for staged in self._reads:
            staged.read()


class Buffers:
    """See runner.Buffers. On the CPU rows are copied where they lie; on a device that only the engine reaches, through the host."""

    def __init__(self, runner: "Runner", names: Sequence[str], shape: tuple[int, ...], dtype: str) -> None:
        self._runner, self._shape, self._dtype = runner, shape, dtype
        self.values = {name: runner.zeros(shape, dtype) for name in names}

    def grow(self, length: int, filled: int) -> None:
        rows, heads, _, width = self._shape
        shape = (rows, heads, length, width)
        values = {}
        for name, value in self.values.items():
            grown = self._runner.zeros(shape, self._dtype)
            array = self._runner.view(grown)
            array[:, :, :filled] = self._runner.view(value)[:, :, :filled]
            values[name] = self._runner.put(grown, array)
        self.values, self._shape = values, shape

    def copy_rows(self, rows: Ids, sources: Ids, filled: int) -> None:
        for value in self.values.values():
            array = self._runner.view(value)
            array[rows, :, :filled] = array[sources, :, :filled]
            self._runner.put(value, array)

    def array(self, name: str, filled: int) -> Array:
        return self._runner.view(self.values[name])[:, :, :filled].copy()


class Runner:
    """One graph, opened.

    Args:
        path: the .onnx file; its weights lie beside it.
        device: "cpu", "cuda" or "cuda-graphs", the latter two with ":N" for another GPU than the first.
        repeats: the calls of this graph are run again and again: on "cuda-graphs" they become CUDA graphs.
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
        repeats: bool = False,
        threads: int | None = None,
        as_written: bool = False,
        weights: Mapping[str, Array] | None = None,
        beside: Path | None = None,
    ) -> None:
        place = Place.of(device)
        self._device, self._ordinal, self._on_host = place.name, place.ordinal, place.name == "cpu"
        self._gpu = None if self._on_host else _gpu(place)
        self._turn: AbstractContextManager[Any] = RECORDING if place.graphs else nullcontext()
        options = session_options(threads, as_written=as_written)
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        model: str | bytes = str(path)
        if beside is not None:  # the engine looks elsewhere only for a model that it is given in memory
            model = path.read_bytes()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
        with self._turn:
            self._session, recorded = open_session(path.name, model, options, place, recorded=repeats)
        self._captures = Captures(self._session) if recorded else None

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
        with self._turn:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, self._ordinal)

    def staged(self, array: Array) -> Staged:
        return Staged(array, self.tensor(array), self._on_host)

    def buffers(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> Buffers | tensors.Buffers:
        with self._turn:
            if self._gpu is not None:
                return tensors.Buffers(self._gpu, names, shape, dtype)
            return Buffers(self, names, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Value:
        return self.tensor(np.zeros(shape, tensors.STORED[dtype]), dtype)

    def put(self, value: Value, array: Array) -> Value:
        """``value``, with the content of ``array``, which is what ``view`` gave of it, changed since."""
        if not self._on_host:
            value.update_inplace(array)
        return value

    def view(self, value: Value) -> Array:
        """The tensor's memory on the CPU, valid only while ``value`` lives; a copy from a device.

        A binding keeps its values and their arrays alive; the array that ``numpy()`` gives does not.
        """
        result: Array = value.numpy()
        return result

    def array(self, value: Value) -> Array:
        """The tensor's numbers, a copy that outlives it."""
        return self.view(value).copy()

    def bind(
        self,
        inputs: Mapping[str, Value | Staged],
        outputs: Mapping[str, Value | Staged],
        reads: Sequence[Staged] = (),
    ) -> Call:
        where = self._device, self._ordinal
        return Call(self._session, where, inputs, outputs, reads, self._gpu, self._captures)

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
            with self._turn:
                self._session.run_with_iobinding(binding)
        except Exception as err:  # the library raises a dozen kinds, without a common base
            raise InputError(
                f"the engine refused these inputs: expected ids and lengths that the model knows, got {_fed(inputs)}; "
                f"look for ids beyond the vocabulary and too long sources; the engine says: {err}"
            ) from err
        return dict(zip(names, binding.get_outputs(), strict=True))


def _gpu(place: Place) -> cuda.Device | None:
    """The device, for who moves what lies there; None where there is no package to do it with."""
    try:
        bindings = cuda.bindings()
    except MissingDependencyError:
        return None
    cuda.capability(bindings, place.ordinal, GRAPHS if place.graphs else "cuda")
    return cuda.Device(bindings, place.ordinal)


def _place(name: str, item: Value | Staged | tensors.Tensor) -> tuple[str, int, tuple[int, ...]]:
    """Where a tensor that is bound as ``name`` lies, and its shape."""
    if isinstance(item, tensors.Tensor):
        return name, item.address, item.shape
    value = item.value if isinstance(item, Staged) else item
    return name, value.data_ptr(), tuple(value.shape())


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
