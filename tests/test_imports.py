"""Who may import whom, what an import may cost, and how long a file may grow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 400
SLOWEST_IMPORT = 0.2  # seconds, without the start of Python


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the files of one place may import besides the standard library; ``lazily``: inside functions only."""

    anywhere: frozenset[str]
    lazily: frozenset[str] = frozenset()


def rule(anywhere: str, lazily: str = "") -> Rule:
    return Rule(anywhere=frozenset(anywhere.split()), lazily=frozenset(lazily.split()))


RUNTIME = "txopt.runtime numpy"
RUNTIME_LAZILY = "tokenizers soundfile PIL safetensors"
CALIBRATION = "txopt.runtime txopt.calibration numpy onnx onnx_ir onnxscript"
EXPORTER = f"{CALIBRATION} txopt.exporter torch transformers safetensors tokenizers huggingface_hub ml_dtypes"
ANY_OF_OURS = "txopt.runtime txopt.calibration txopt.exporter txopt.cli benchmarks"

# The longest matching path decides.
FRONT = "txopt.console txopt.inspection txopt.page txopt.summary txopt.demonstration txopt.benchmarks"
RULES = {
    "runtime": rule(RUNTIME, RUNTIME_LAZILY),
    "runtime/backends/captures.py": rule("onnxruntime"),
    "runtime/backends/ort.py": rule(f"{RUNTIME} onnxruntime", RUNTIME_LAZILY),
    "runtime/backends/ort_session.py": rule(f"{RUNTIME} onnxruntime"),
    "runtime/backends/cuda.py": rule(RUNTIME, "cuda"),
    "runtime/backends/trt.py": rule(RUNTIME),  # its libraries by name
    "calibration": rule(f"{CALIBRATION} onnxruntime", RUNTIME_LAZILY),
    "calibration/metrics.py": rule(CALIBRATION, "jiwer sacrebleu"),
    "exporter": rule(EXPORTER, "PIL soundfile"),
    "exporter/report.py": rule(EXPORTER, "txopt.page"),  # which knows nothing above runtime
    "src/txopt/__init__.py": rule("", ANY_OF_OURS),
    "src/optimum": rule("optimum.commands", "txopt.cli"),
    "src/txopt": rule(
        "txopt.runtime.errors txopt.options txopt.engine_command txopt.surroundings typer rich click",
        f"{ANY_OF_OURS} {FRONT} numpy torch",
    ),
    "src/txopt/summary.py": rule("txopt.runtime"),
    "src/txopt/page": rule("txopt.runtime txopt.page txopt.summary", "jinja2"),
    "src/txopt/demonstration.py": rule("txopt.console txopt.runtime.errors", f"{ANY_OF_OURS} {FRONT} torch"),
    "benchmarks": rule(f"{ANY_OF_OURS} txopt.benchmarks numpy typer rich", "torch transformers"),
    "benchmarks/cuda_steps.py": rule("txopt.runtime txopt.benchmarks numpy onnxruntime"),
    "benchmarks/fused_speed.py": rule(
        "txopt.exporter txopt.benchmarks numpy", "onnxruntime"
    ),  # foreign files, as they are
    "benchmarks/in_place.py": rule("txopt.exporter txopt.benchmarks numpy", "onnxruntime torch"),
    "benchmarks/kernels.py": rule("", "onnxruntime"),
    "benchmarks/operators.py": rule("txopt.benchmarks numpy", "onnx onnxruntime"),
    "benchmarks/caches.py": rule("txopt.benchmarks numpy onnx onnxruntime"),
    "benchmarks/quantization_loss.py": rule(f"{ANY_OF_OURS} txopt.benchmarks txopt.examples.g2p.data"),
    "benchmarks/engine_graphs.py": rule("txopt.exporter txopt.calibration txopt.runtime numpy onnx_ir"),
    "benchmarks/engines.py": rule(f"{ANY_OF_OURS} txopt.benchmarks onnx_ir"),
    "benchmarks/fusers.py": rule("txopt.exporter", "onnx onnx_ir onnxruntime onnxscript"),
}
OURS = [file for top in ("src", *RULES) for file in sorted((ROOT / top).rglob("*.py"))]
CHECKED = sorted({file.relative_to(ROOT).as_posix() for file in OURS})


def rule_for(file: str) -> Rule:
    return RULES[max((place for place in RULES if file == place or file.startswith(f"{place}/")), key=len)]


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module, whether importing the file leaves it alone, line) of every import statement below ``tree``.

    ``from package import name`` counts as ``package.name``: it may be a module. Relative imports start with a dot.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            yield from ((f"{package}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from ((name, True, line) for name, _, line in imports(node, lazy))
        else:
            yield from imports(node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def within(module: str, allowed: frozenset[str]) -> bool:
    return module == "txopt.__version__" or any(f"{module}.".startswith(f"{name}.") for name in allowed)


def violations(file: str, source: str) -> list[str]:
    """One line for every import in ``source`` that the rule for ``file`` does not allow."""
    allowed = rule_for(file)
    return [
        f"{file}:{line} imports {module} " + ("at import time" if within(module, allowed.lazily) else "at all")
        for module, lazy, line in imports(ast.parse(source))
        if module.split(".")[0] not in sys.stdlib_module_names
        and not within(module, allowed.anywhere)
        and not (lazy and within(module, allowed.lazily))
    ]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("file", CHECKED)
def test_imports_point_downward_only(file: str) -> None:
    assert violations(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("runtime/generate.py", "import torch"),
        ("runtime/generate.py", "def f():\n    import transformers"),
        ("runtime/generate.py", "from onnxruntime import InferenceSession"),
        ("runtime/generate.py", "import soundfile"),
        ("runtime/generate.py", "from txopt.exporter import custom"),
        ("runtime/generate.py", "from txopt import exporter"),
        ("runtime/generate.py", "import txopt"),
        ("runtime/generate.py", "from . import errors"),
        ("runtime/generate.py", "import exporter"),
        ("runtime/backends/ort.py", "import tensorrt"),
        ("runtime/backends/cuda.py", "from cuda.bindings import runtime"),
        ("runtime/backends/trt.py", "import tensorrt"),
        ("calibration/collect.py", "import torch"),
        ("calibration/collect.py", "from txopt.exporter.graph import nodes"),
        ("calibration/gate.py", "def f():\n    import jiwer"),
        ("calibration/metrics.py", "import sacrebleu"),
        ("exporter/trace.py", "import onnxruntime"),
        ("exporter/trace.py", "from txopt.cli import main"),
        ("src/txopt/cli.py", "import numpy"),
        ("src/txopt/cli.py", "from txopt.exporter.pipeline import export"),
        ("benchmarks/peers.py", "import onnxruntime"),
    ],
)
def test_a_forbidden_import_is_caught(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("runtime/generate.py", "import numpy as np\nfrom txopt.runtime import errors\nfrom txopt import __version__"),
        ("runtime/tasks.py", "def f():\n    import soundfile"),
        (
            "runtime/tasks.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from tokenizers import Tokenizer",
        ),
        ("runtime/backends/ort.py", "import onnxruntime as ort"),
        ("exporter/trace.py", "from txopt.calibration import ranges\nimport torch.nn"),
        ("src/txopt/cli.py", "def f():\n    from txopt.exporter.pipeline import export"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_the_runtime_works_without_torch_and_transformers() -> None:
    modules = [
        "txopt." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in CHECKED
        if file.startswith("runtime/")
    ]
    run_python(f"""
import importlib, sys
sys.modules |= dict.fromkeys(("torch", "transformers"))
for module in {modules}:
    importlib.import_module(module)
""")


@pytest.mark.parametrize("module", ["txopt", "txopt.cli"])
def test_the_surface_imports_nothing_heavy(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert {"numpy", "onnx", "onnxruntime", "tokenizers", "torch", "transformers"}.isdisjoint(loaded)


def test_importing_txopt_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import txopt; print(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(5)) < SLOWEST_IMPORT


def test_every_public_name_resolves_and_no_other() -> None:
    import txopt

    assert all(hasattr(txopt, name) for name in txopt.__all__)
    assert not hasattr(txopt, "no_such_name")


def test_no_file_is_asking_to_be_two() -> None:
    files = [file for top in (*RULES, "examples", "tests") for file in (ROOT / top).rglob("*.py")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}
