"""An artifact's twin whose inputs of products are scaled as AWQ scales them: it says the same, and its weights are easier to round."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from txopt.calibration.awq import fold_scales
from txopt.calibration.blocks import BlockScheme
from txopt.exporter.attempt import graphs_of, twin
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact

Moments = Mapping[str, Mapping[str, NDArray[Any]]]


def scaled(artifact: Artifact, moments: Moments, scheme: BlockScheme, folder: Path) -> tuple[Artifact, Moments]:
    """The twin, in ``folder``, and the second moments of what its products read.

    Args:
        artifact: in float32, left alone.
        moments: [K,K] by graph and input.
        scheme: what weights are going to be rounded to.
        folder: an empty one.
    """
    models = graphs_of(artifact)
    seen = {name: fold_scales(model.graph, moments[name], scheme) for name, model in models.items()}
    made = twin(artifact, models, folder)
    shutil.copyfile(artifact.file(cases.FILE), folder / cases.FILE)
    return made, seen
