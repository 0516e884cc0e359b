"""What single choices are worth: ``python -m txopt.benchmarks.choices [--out FILE.json]``.

A Marian-sized model with random weights, 64 tokens in, 24 out, fp32, as it is and without one choice at a time, in turn. A call
is two generate() back to back, as in a server. Ratios above 1 speak for the choice.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from txopt.benchmarks.main_road import build
from txopt.benchmarks.timing import in_turn, ratio
from txopt.runtime.model import Model, load

SOURCE_LENGTH, NEW_TOKENS, REPEATS = 64, 24, 9


def variants(work: Path) -> dict[str, Model]:
    """The model as it is ("all"), and without one choice each."""
    from txopt.exporter import fusion
    from txopt.exporter.pipeline import export
    from txopt.runtime.backends import ort

    source = build("marian", work / "marian")
    whole = export(source, work / "all").path
    models = {"all": load(whole)}
    for rule in (fusion.qkv.fuse, fusion.reshape.fuse):
        name = str(rule.__module__).rpartition(".")[2]
        others = tuple(other for other in fusion.FUSIONS if other is not rule)
        with patch.object(fusion, "FUSIONS", others):
            models[f"without fusion/{name}"] = load(export(source, work / name).path)
    with patch.object(ort, "CONFIGURATION", {}):
        models["without idle threads asleep"] = load(whole)
    with patch.object(ort, "collapsed", nullcontext):
        models["without large pages"] = load(whole)
    return models


def measure(models: dict[str, Model], batch: int) -> dict[str, Any]:
    """Ratios of each variant's time to that of all choices together, whose ids they must give."""
    ids = np.random.default_rng(0).integers(5, 30000, (batch, SOURCE_LENGTH))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 1}
    expected = models["all"].generate(input_ids=ids, **options).sequences
    for name, model in models.items():
        if not np.array_equal(model.generate(input_ids=ids, **options).sequences, expected):
            raise SystemExit(f"{name}: other ids; its time would mean nothing")

    def twice(model: Model) -> Callable[[], None]:
        def call() -> None:
            for _ in range(2):
                model.generate(input_ids=ids, **options)

        return call

    times = in_turn({name: twice(model) for name, model in models.items()}, repeats=REPEATS)
    return {
        name: {**times[name].to_json(), "ratio": ratio(times["all"], times[name])} for name in models if name != "all"
    } | {"all": times["all"].to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = variants(Path(folder))
        result = {f"batch {batch}": measure(models, batch) for batch in (1, 8)}
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
