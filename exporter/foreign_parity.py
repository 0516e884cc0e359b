"""Whether an optimized graph says what the foreign one said, on the same random inputs of several sets of sizes."""

from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt.exporter.foreign_feeds import text
from txopt.exporter.foreign_original import Original
from txopt.exporter.onnx_file import OPSET
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import ParityError, SourceError, TxoptError, explain
from txopt.runtime.parity import TOLERANCE

_MOST_PROBLEMS = 5


def precision(model: ir.Model) -> str:
    """fp16 where any tensor of the graph's surface or weights is float16, else fp32."""
    values = (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())
    return "fp16" if any(value.dtype == ir.DataType.FLOAT16 for value in values) else "fp32"


def prove(original: Original, optimized: Path, kind: str) -> dict[str, Any]:
    """Asks the file ``optimized`` what ``original`` was asked; ``kind`` is the precision of both.

    Returns the certificate: precision, tolerance, largest error, the sizes that were run and those that told nothing, because
    the original refused them or answered without one finite number. Errors are relative to the largest expected number
    where that is above one.

    Raises:
        ParityError: they differ by more than the tolerance, in shape, in integers, or in which numbers are finite.
        SourceError: the original runs on none of the sizes tried.
    """
    path = original.path
    if not original.answers:
        title = (
            f"{path}: expected a graph that runs on random inputs, found none that it takes, so nothing can be proved:"
        )
        raise SourceError(explain(title, original.said[-2:]))
    largest, runs, problems = 0.0, [], []
    try:
        after = Runner(optimized)
    except TxoptError as err:
        raise SourceError(
            f"{path}: expected operators that ONNX Runtime knows in opset {OPSET} too, found: {err}"
        ) from err
    for answer in original.answers:
        try:
            found = {name: after.array(value) for name, value in after.run(answer.feeds).items()}
        except TxoptError as err:
            raise ParityError(
                f"the optimized graph does not run where {path} does ({text(answer.sizes)}): {err}"
            ) from err
        errors = answer.errors(found)
        for name, error in errors.items():
            if not error <= TOLERANCE[kind]:
                problems.append(f"{name} deviates by {error:.3g}, allowed {TOLERANCE[kind]:.3g} ({text(answer.sizes)})")
        worst = max(errors.values(), default=0.0)
        largest = max(largest, worst)
        runs.append({"sizes": answer.sizes, "error": worst})
    if problems:
        title = f"the optimized graph does not say what {path} says; nothing was written:"
        raise ParityError(explain(title, problems[:_MOST_PROBLEMS]))
    certificate = {"precision": kind, "tolerance": TOLERANCE[kind], "largest_error": largest}
    return {**certificate, "runs": runs, "not_run": original.not_run}
