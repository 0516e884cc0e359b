"""One TensorRT plan, opened: contexts by profile, calls along the device's stream, and steps recorded as CUDA graphs.

Owns which profile a call takes, how a context is set up, and when a call is recorded. It knows TensorRT by what its engine and context
objects do, whichever of the libraries they are of, and no generation. Source: TensorRT's documentation of IExecutionContext and "CUDA
Graphs": a recorded call holds for one setting of its context, which is run once before it is recorded.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from txopt.runtime.arrays import Array
from txopt.runtime.backends.cuda import Device, Recorded
from txopt.runtime.backends.pool import Block
from txopt.runtime.backends.tensors import Buffers, Staged, Tensor, empty, size_of, uploaded
from txopt.runtime.engines import Plan, Profile
from txopt.runtime.errors import InputError, LimitError, TxoptError
from txopt.runtime.opened import Opened

logger = logging.getLogger(__name__)

# How who builds engines raises the limit of a length.
OPTIONS = {"B": "--max-batch", "R": "--max-beams", "S": "--cache-length"}
SOURCE_OPTION = "--max-source"

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}

Said = Callable[[], str]
Key = tuple[tuple[str, int, tuple[int, ...], int], ...]  # name, address, shape, address of the host's side


class Runner:
    """See runner.Runner.

    Args:
        engine: of ``plan``. strategy: the library's name for contexts that take memory for their own profile only.
        said: what the library last complained of.
    """

    def __init__(self, engine: Any, plan: Plan, device: Device, strategy: Any, said: Said) -> None:
        self._engine, self._plan, self._device, self._strategy, self._said = engine, plan, device, strategy, said
        self._contexts: dict[int, Context] = {}

    def opened(self) -> Opened:
        """The plan's inputs and outputs as the engine has them."""
        engine = self._engine
        tensors: dict[bool, dict[str, Any]] = {True: {}, False: {}}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            shape = tuple(None if size == -1 else size for size in engine.get_tensor_shape(name))
            kind = engine.get_tensor_dtype(name).name
            tensors[engine.get_tensor_mode(name).name == "INPUT"][name] = (_DTYPES.get(kind, kind), shape)
        return Opened(inputs=tensors[True], outputs=tensors[False])

    def describe(self, value: Any) -> tuple[str, tuple[int, ...]]:
        if not isinstance(value, Tensor) or value.device is not self._device:
            raise InputError(
                f"encoded: expected what this model's encode() gave, on its own device, got {type(value).__name__}"
            )
        return value.dtype, value.shape

    def array(self, value: Tensor) -> Array:
        return value.array()

    def tensor(self, array: Array) -> Tensor:
        return uploaded(self._device, array)

    def staged(self, array: Array) -> Staged:
        return Staged(self._device, array)

    def buffers(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> Buffers:
        return Buffers(self._device, names, shape, dtype)

    def bind(
        self, inputs: Mapping[str, Tensor | Staged], outputs: Mapping[str, Tensor | Staged], reads: Sequence[Staged]
    ) -> "Call":
        context = self._context({name: _tensor(item).shape for name, item in inputs.items()})
        return Call(context, self._device, inputs, outputs, reads)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        """An input of bfloat16 is given as its bits, uint16."""
        context = self._context({name: array.shape for name, array in inputs.items()})
        with self._device:
            given = {name: uploaded(self._device, array) for name, array in inputs.items()}
            shapes = context.shapes({name: tensor.shape for name, tensor in given.items()})
            kinds = {item.name: (item.dtype, shapes[item.name]) for item in self._plan.outputs}
            outputs = empty(self._device, kinds)
            Call(context, self._device, given, outputs, (), once=True).run()
        return outputs

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> "Context":
        """That of the narrowest profile which takes inputs of these ``shapes``."""
        lengths: dict[str, int] = {}
        for item in self._plan.inputs:
            lengths |= {
                axis: size for axis, size in zip(item.axes, shapes[item.name], strict=True) if isinstance(axis, str)
            }
        fits = [index for index, profile in enumerate(self._plan.profiles) if profile.takes(lengths)]
        if not fits:
            raise _beyond(self._plan, lengths)
        index = min(fits, key=lambda index: prod(most for _, _, most in self._plan.profiles[index].axes.values()))
        with self._device as device:
            if index not in self._contexts:
                made = self._engine.create_execution_context(self._strategy)
                if made is None or not made.set_optimization_profile_async(index, device.stream):
                    profile = self._plan.profiles[index].name
                    raise TxoptError(f"{self._plan.file}: there is no memory to run profile {profile}: {self._said()}")
                device.wait()
                self._contexts[index] = Context(made, self._engine, self._plan, self._device, self._said)
            return self._contexts[index]


class Context:
    """An execution context of one profile: what it is set up for, and the recorded call that holds for it."""

    def __init__(self, context: Any, engine: Any, plan: Plan, device: Device, said: Said) -> None:
        self._context, self._plan, self._device, self._said = context, plan, device, said
        self._aliased = {item.name: engine.get_aliased_input_tensor(item.name) for item in plan.outputs}
        self._capturable = getattr(context, "is_stream_capturable", lambda stream: True)  # which TensorRT-RTX alone has
        self._scratch: dict[str, Block] = {}  # for outputs that nobody asked for, or that are copied back
        self._copies: list[tuple[int, int, int]] = []  # to, from, bytes; after each run
        self._key: Key | None = None
        self._has_run, self._refused = False, False
        self._recorded: Recorded | None = None

    def shapes(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the outputs, for inputs of these shapes."""
        self._key, self._recorded = None, None
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, shape):
                raise TxoptError(f"{self._plan.file}: the engine does not take {name} {list(shape)}: {self._said()}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as err:
            raise TxoptError(f"{self._plan.file}: the engine knows no lengths for these inputs: {err}") from err
        if missing:
            raise TxoptError(f"{self._plan.file}: the engine lacks {', '.join(missing)}: {self._said()}")
        return {item.name: tuple(self._context.get_tensor_shape(item.name)) for item in self._plan.outputs}

    def set_up(self, key: Key, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Lets the context read and write these tensors; nothing to do where it does already."""
        if key is self._key or key == self._key:
            return
        shapes = self.shapes({name: tensor.shape for name, tensor in inputs.items()})
        self._has_run, self._copies = False, []
        addresses = {name: tensor.address for name, tensor in inputs.items()}
        owners = {tensor.address: name for name, tensor in inputs.items()}
        for item in self._plan.outputs:
            shape, bound = shapes[item.name], outputs.get(item.name)
            if bound is not None and (bound.shape, bound.dtype) != (shape, item.dtype):
                raise TxoptError(
                    f"{self._plan.file}: expected {item.name} {bound.dtype} {list(bound.shape)}, found that the engine gives "
                    f"{item.dtype} {list(shape)}"
                )
            size = size_of(shape, item.dtype)
            owner = None if bound is None else owners.get(bound.address)
            if bound is None or (owner is not None and self._aliased[item.name] != owner):
                addresses[item.name] = self._beside(item.name, size)
                if bound is not None:
                    self._copies.append((bound.address, addresses[item.name], size))
            else:
                addresses[item.name] = bound.address
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise TxoptError(f"{self._plan.file}: the engine does not take memory for {name}: {self._said()}")
        self._key = key

    def run(self, uploads: Sequence[Staged], once: bool) -> None:
        """Uploads and runs what the context is set up for, by one call where it has run before."""
        if self._recorded is None and self._has_run and not once and not self._refused:
            self._record(uploads)
        if self._recorded is not None:
            self._device.replay(self._recorded)
        elif not self._enqueue(uploads):
            raise TxoptError(f"{self._plan.file}: the engine failed: {self._said()}")
        self._has_run = True

    def _enqueue(self, uploads: Sequence[Staged]) -> bool:
        for staged in uploads:
            staged.upload()
        if not self._context.execute_async_v3(self._device.stream):
            return False
        for to, source, size in self._copies:
            self._device.copy(to, source, size)
        return True

    def _record(self, uploads: Sequence[Staged]) -> None:
        if not self._capturable(self._device.stream):  # yet: kernels for these shapes may still be compiled
            return
        self._recorded = self._device.record(lambda: self._enqueue(uploads))
        if self._recorded is None:
            self._refused = True
            logger.info("%s: not recorded as a CUDA graph, so steps cost more: %s", self._plan.file, self._said())

    def _beside(self, name: str, size: int) -> int:
        block = self._scratch.get(name)
        if block is None or block.size < size:
            self._scratch[name] = block = self._device.memory.take(size)
        return block.address


class Call:
    """See runner.Call. ``once``: it will not be run again, so it is not recorded."""

    def __init__(
        self,
        context: Context,
        device: Device,
        inputs: Mapping[str, Tensor | Staged],
        outputs: Mapping[str, Tensor | Staged],
        reads: Sequence[Staged],
        once: bool = False,
    ) -> None:
        self._context, self._device, self._reads, self._once = context, device, reads, once
        self._uploads = [item for item in inputs.values() if isinstance(item, Staged)]
        self._inputs, self._outputs = ({n: _tensor(item) for n, item in items.items()} for items in (inputs, outputs))
        self._key: Key = tuple(
            (name, _tensor(item).address, _tensor(item).shape, item.host if isinstance(item, Staged) else 0)
            for name, item in (*inputs.items(), *outputs.items())
        )

    def run(self) -> None:
        with self._device as device:
            self._context.set_up(self._key, self._inputs, self._outputs)
            self._context.run(self._uploads, self._once)
            for staged in self._reads:
                staged.download()
            device.wait()


def _tensor(item: Tensor | Staged) -> Tensor:
    return item.value if isinstance(item, Staged) else item


def _beyond(plan: Plan, lengths: Mapping[str, int]) -> LimitError:
    """What to raise where no profile takes these lengths: what each takes, and how to have more."""
    asked = " ".join(f"{axis}={length}" for axis, length in sorted(lengths.items()))
    least, most = (
        {axis: choose(profile.axes[axis][place] for profile in plan.profiles) for axis in lengths}
        for choose, place in ((min, 0), (max, 2))
    )
    options = sorted({OPTIONS.get(axis, SOURCE_OPTION) for axis, length in lengths.items() if length > most[axis]})
    short = [f"{axis} of at least {least[axis]}" for axis, length in lengths.items() if length < least[axis]]
    takes = "; ".join(f"{profile.name} takes {_ranges(profile, lengths)}" for profile in plan.profiles)
    advice = f"give fewer or shorter ones, or build engines for more: txopt engine {' '.join(options)}"
    if not options:
        advice = f"pad to {' and '.join(short)}" if short else "build engines whose profiles take them together"
    return LimitError(f"{plan.file}: no profile of this engine takes {asked}: {takes}; {advice}")


def _ranges(profile: Profile, lengths: Mapping[str, int]) -> str:
    ranges = ((axis, profile.axes[axis][0], profile.axes[axis][2]) for axis in sorted(lengths))
    return ", ".join(
        f"{axis} {least}" if least == most else f"{axis} {least} to {most}" for axis, least, most in ranges
    )
