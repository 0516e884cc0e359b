"""What holds for every test: one thread, one seed, no network."""

import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from txopt.runtime.artifact import Artifact

# Read by torch and huggingface_hub when they are first imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch writes its structured trace to this logger, megabytes of it; pytest would keep every record.
logging.getLogger("torch.__trace").propagate = False

settings.register_profile("txopt", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("txopt")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state and hears all messages, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    logging.getLogger("txopt").setLevel(logging.NOTSET)  # a command with --quiet that ran in this process set it


@pytest.fixture(scope="session")
def g2p(tmp_path_factory: pytest.TempPathFactory) -> "Artifact":
    """The artifact of the bundled g2p model, exported once."""
    from txopt.exporter.pipeline import export

    return export("txopt.examples.g2p.model:factory", tmp_path_factory.mktemp("g2p") / "artifact")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of tiny models by name (tests/exporter/models.py), each made once."""
    from tests.exporter.models import checkpoint

    directory = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = checkpoint(name, directory)
        return made[name]

    return make


@pytest.fixture(scope="session")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]
) -> "Callable[[str], Artifact]":
    """Artifacts of the same."""
    from txopt.exporter.pipeline import export

    directory = tmp_path_factory.mktemp("artifacts")
    made: dict[str, Artifact] = {}

    def make(name: str) -> "Artifact":
        if name not in made:
            made[name] = export(checkpoints(name), directory / name)
        return made[name]

    return make
