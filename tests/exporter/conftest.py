"""Checkpoints and artifacts of tiny models, each made once."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporter.models import checkpoint
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact

# torch writes its structured trace to this logger, megabytes of it; pytest would keep every record.
logging.getLogger("torch.__trace").propagate = False

Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Make:
    directory = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = checkpoint(name, directory)
        return made[name]

    return make


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, checkpoints: Make) -> Callable[[str], Artifact]:
    directory = tmp_path_factory.mktemp("artifacts")
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            made[name] = export(checkpoints(name), directory / name)
        return made[name]

    return make
