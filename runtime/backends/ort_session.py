"""ONNX Runtime's sessions: which provider a device means, what the engine is told, and what goes wrong where it is opened.

Owns the options, with the reason of each, and the checks. What is run in a session is ort.py's.
"""

import logging
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from typing import Any, Self

import onnxruntime

from txopt.runtime.backends.huge_pages import collapsed
from txopt.runtime.counts import count
from txopt.runtime.errors import ArtifactError, MissingDependencyError, UsageError

MOST_THREADS = 4096  # far beyond any machine; the engine starts as many as it is told, or ends the process

CONFIGURATION = {
    # Idle workers would spin on: the encoder's against the decoder's first steps, both against the caller (docs/decisions.md 13).
    "session.force_spinning_stop": "1",
    # x86 without VNNI would add pairs of products of int8 in 16 bits, which saturate; slower kernels do not. Others ignore it.
    "session.x64quantprecision": "1",
    # Products with weights that a graph dequantizes are of floats, and stay so where it makes MatMulNBits of them. Its default is 4.
    "session.qdq_matmulnbits_accuracy_level": "1",
}

DISABLED = [
    # Takes a Relu away before a QuantizeLinear whose least code is 0, and takes float8 for such (1.32): negative numbers then pass.
    "ReluQuantRewrite",
    # Makes signed codes unsigned; with the kernels above, those of weights too, with one zero point for all their scales, which no run
    # accepts (1.32). Products of signed codes are computed in float instead; the CPU's lowering makes them unsigned itself.
    "QDQS8ToU8Transformer",
]
DISABLED_ON_CUDA = [
    # Makes a Slice of a lookup of rows in a row, and puts its bounds on the CPU: copies to and fro, and no CUDA graph (1.31).
    "GatherToSliceFusion",
]

CUDA = "CUDAExecutionProvider"
GRAPHS = "cuda-graphs"  # the device on which calls that are repeated become CUDA graphs

Session = Any  # onnxruntime.InferenceSession and its options: the library ships no types
Options = Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a session computes: the device by the library's name, its number, and whether calls become CUDA graphs there."""

    name: str
    ordinal: int = 0
    graphs: bool = False

    @classmethod
    def of(cls, device: str) -> Self:
        """
        Errors:
            UsageError: no such device. MissingDependencyError: this ONNX Runtime is for the CPU alone.
        """
        kind, _, ordinal = device.partition(":")
        if kind == "cpu":
            return cls(name="cpu")
        if kind not in ("cuda", GRAPHS) or not (ordinal or "0").isdecimal() or len(ordinal) > 4:
            raise UsageError(f'device must be "cpu", "cuda", "{GRAPHS}", or the latter two with ":N", got {device!r}')
        if CUDA not in onnxruntime.get_available_providers():
            raise MissingDependencyError(
                f'device="{kind}" needs ONNX Runtime\'s CUDA provider, which this onnxruntime does not have: '
                'pip uninstall onnxruntime, then pip install "onnxruntime-gpu[cuda,cudnn]" cuda-bindings'
            )
        _load_libraries()
        return cls(name="cuda", ordinal=int(ordinal or 0), graphs=kind == GRAPHS)


@cache
def _load_libraries() -> None:
    """CUDA's libraries from where pip puts them: the linker does not look there. What is not found is a session's to say."""
    with redirect_stdout(StringIO()):  # where this function complains
        onnxruntime.preload_dlls()


def session_options(threads: int | None, *, as_written: bool) -> Options:
    """See ``ort.Runner``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and said once
    for key, value in CONFIGURATION.items():
        options.add_session_config_entry(key, value)
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
    if threads is not None:
        options.intra_op_num_threads = count("threads", threads, MOST_THREADS)
    return options


def open_session(
    name: str, model: str | bytes, options: Options, place: Place, *, recorded: bool
) -> tuple[Session, bool]:
    """A session of ``model``, a path or what is in the file ``name``; and whether it records CUDA graphs, where it was to.

    Errors:
        ArtifactError: the library cannot open the graph. MissingDependencyError: it cannot compute on the GPU.
    """
    recorded = recorded and place.graphs
    cuda = (CUDA, {"device_id": str(place.ordinal), **({"enable_cuda_graph": "1"} if recorded else {})})
    on_gpu = place.name == "cuda"
    try:
        with collapsed():
            session = onnxruntime.InferenceSession(
                model,
                options,
                providers=[*([cuda] if on_gpu else []), "CPUExecutionProvider"],
                disabled_optimizers=[*DISABLED, *(DISABLED_ON_CUDA if on_gpu else [])],
                enable_fallback=0,  # it says on stdout that it takes the CPU instead
            )
    except Exception as err:  # the library raises a dozen kinds, without a common base
        if recorded:
            logger.warning("%s runs without CUDA graphs: %s", name, err)
            return open_session(name, model, options, place, recorded=False)
        raise ArtifactError(
            f"{name}: ONNX Runtime {onnxruntime.__version__} cannot open this graph (opset 24 needs 1.30 or newer): {err}"
        ) from err
    if on_gpu and CUDA not in session.get_providers():
        raise MissingDependencyError(
            "ONNX Runtime finds no NVIDIA GPU that it could use: expected one, with its driver (does nvidia-smi show it?), and the "
            f'libraries of CUDA {onnxruntime.cuda_version} and cuDNN 9: pip install "onnxruntime-gpu[cuda,cudnn]"; or use device="cpu"'
        )
    return session, recorded
