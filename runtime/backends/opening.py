"""Which engine a device means, and an artifact's graphs opened by it.

Owns the names of devices. Each engine's library is imported only where its device is asked for.
"""

import re

from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.runner import Engines
from txopt.runtime.errors import UsageError
from txopt.runtime.strict_json import show

KINDS = ("cpu", "cuda", "cuda-graphs", "tensorrt")
ORDINAL = re.compile("[0-9]{1,4}")  # of a GPU


def open_engines(artifact: Artifact, *, device: str, threads: int | None, as_written: bool) -> Engines:
    """The graphs of ``artifact``, ready to run on ``device``; the other arguments are ONNX Runtime's (``ort.Runner``).

    Errors:
        UsageError: a device or a number of threads that is none, or engines that the artifact does not have.
        MissingDependencyError: the device needs a package that is not installed.
        ArtifactError: a graph or an engine that cannot be opened.
    """
    kind, colon, ordinal = device.partition(":") if isinstance(device, str) else ("", "", "")
    numbered = not colon or (kind != "cpu" and ORDINAL.fullmatch(ordinal) is not None)
    if kind not in KINDS or not numbered:
        named = ", ".join(f'"{kind}"' for kind in KINDS)
        raise UsageError(
            f'device must be one of {named}, all but the first also with ":N" for GPU N, got {show(device)}'
        )
    if kind == "tensorrt":
        from txopt.runtime.backends.trt import open_plans

        return open_plans(artifact, int(ordinal or 0))
    from txopt.runtime.backends.ort import Runner

    manifest = artifact.manifest
    runners = {
        name: Runner(
            artifact.file(spec.file),
            device=device,
            repeats=name == "decoder",
            threads=threads,
            as_written=as_written,
        )
        for name, spec in manifest.graphs.items()
    }
    # ONNX Runtime's CPU provider has no bfloat16: but for cuda, graphs widen such weights and compute in float32.
    widened = manifest.precision == "bf16" and manifest.target != "cuda"
    return Engines(
        runners=runners,
        specs=manifest.graphs,
        cache=manifest.cache,
        precision=manifest.precision,
        arithmetic="fp32" if widened else manifest.precision,
    )
