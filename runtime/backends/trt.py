"""An artifact's TensorRT engines, opened: the library by name, what could crash asked for first, then the plans.

Owns the order of the checks: TensorRT ends the process where it meets no driver, so a driver and a GPU are looked
for before it sees a plan, and it sees only plans that the artifact lists. What runs is in plan.py; this knows no generation.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from txopt.runtime.artifact import Artifact
from txopt.runtime.backends import cuda
from txopt.runtime.backends.fitting import contract_problems, fitting
from txopt.runtime.backends.plan import OPTIONS, Runner
from txopt.runtime.backends.runner import Engines
from txopt.runtime.backends.trt_log import log_of
from txopt.runtime.decoder import THIS_MODEL
from txopt.runtime.engines import FILE, LIBRARIES, EngineSet, Plan, engines_of
from txopt.runtime.errors import ArtifactError, MissingDependencyError, UsageError, explain
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.strict_json import limited


def open_plans(artifact: Artifact, number: int) -> Engines:
    """The engines of ``artifact`` for GPU ``number``, ready to run.

    Errors, in the order of the checks:
        UsageError: the artifact has no engines.
        MissingDependencyError: none of the libraries that they are of is installed, or cuda-bindings is not.
        UsageError: no driver, no such GPU, or no engine for it. StaleError: engines of another version.
        ArtifactError: engines that are not of the artifact's graphs, or that the library cannot open.
    """
    sets = engines_of(artifact)
    if not sets:
        raise UsageError(
            f"{artifact.path}: this artifact has no TensorRT engines; build them: txopt engine {artifact.path} --capability SM89, "
            "where nvidia-smi --query-gpu=compute_cap --format=csv says 8.9"
        )
    libraries = _libraries({one.runtime for one in sets})
    bindings = cuda.bindings()
    capability = cuda.capability(bindings, number)
    versions = {name: library.__version__ for name, library in libraries.items()}
    chosen = fitting(sets, versions, capability)
    _check_contract(artifact, chosen)
    library, device = libraries[chosen.runtime], cuda.Device(bindings, number)
    log = log_of(library)
    runtime = library.Runtime(log)
    if chosen.any_version and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True  # such plans carry the part of the library that runs them
    strategy = library.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    runners = {
        name: Runner(_engine(artifact, runtime, plan, log.said), plan, device, strategy, log.said)
        for name, plan in chosen.plans.items()
    }
    return _described(artifact, chosen, runners)


def _libraries(wanted: set[str]) -> dict[str, Any]:
    """Those of ``wanted`` that are installed, by name."""
    found, missing = {}, []
    for name in sorted(wanted):
        reasons = []
        for module in LIBRARIES[name].modules:
            try:
                found[name] = import_module(module)
                break
            except (ImportError, OSError) as err:  # the latter where the library's own libraries are not found
                reasons.append(str(err))
        else:
            missing.append(f"{name}: pip install {LIBRARIES[name].package} ({reasons[-1]})")
    if not found:
        raise MissingDependencyError(
            explain(
                'device="tensorrt" needs the library of this artifact\'s engines, which cannot be imported:', missing
            )
        )
    return found


def _check_contract(artifact: Artifact, chosen: EngineSet) -> None:
    graphs = artifact.manifest.graphs
    problems = [
        problem
        for name, plan in chosen.plans.items()
        for problem in contract_problems(name, graphs[name], plan, chosen.cache_length)
    ]
    if problems:
        title = f"{artifact.path}: {FILE} describes engines of other graphs than the manifest's; build them again (txopt engine):"
        raise ArtifactError(explain(title, limited(problems)))


def _engine(artifact: Artifact, runtime: Any, plan: Plan, said: Callable[[], str]) -> Any:
    engine = runtime.deserialize_cuda_engine(artifact.file(plan.file).read_bytes())
    if engine is None:
        raise ArtifactError(
            f"{plan.file}: the library cannot open this engine; build it again (txopt engine): {said()}"
        )
    if engine.num_optimization_profiles != len(plan.profiles):
        raise ArtifactError(
            f"{plan.file}: expected the {len(plan.profiles)} profiles that {FILE} lists, found "
            f"{engine.num_optimization_profiles}; build it again (txopt engine)"
        )
    names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    here = sorted(name for name in names if engine.get_tensor_location(name).name != "DEVICE")
    if here:  # lengths that a graph computes of numbers in them; an address of the device would end the process
        raise ArtifactError(f"{plan.file}: expected all tensors on the device, found on the host: {', '.join(here)}")
    return engine


def _described(artifact: Artifact, chosen: EngineSet, runners: dict[str, Runner]) -> Engines:
    specs = {
        name: GraphSpec(file=plan.file, inputs=plan.inputs, outputs=plan.outputs) for name, plan in chosen.plans.items()
    }
    known, most_queries, limited_by = artifact.manifest.cache, None, THIS_MODEL
    if known is not None and chosen.cache_length is not None:
        dtype = next(item.dtype for item in specs["decoder"].inputs if item.name.startswith("self_"))
        length = min(chosen.cache_length, known.max_length or chosen.cache_length)
        if length != known.max_length:
            limited_by = f"this model's engine (txopt engine {OPTIONS['S']} builds longer ones)"
        most_queries = max(profile.axes["Q"][2] for profile in chosen.plans["decoder"].profiles)
        known = replace(known, dtype=dtype, max_length=length)
    return Engines(
        runners=runners,
        specs=specs,
        cache=known,
        precision=chosen.precision,
        arithmetic=chosen.precision,
        most_queries=most_queries,
        limited_by=limited_by,
    )
