"""Fixtures of more than one file here."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeTensorRT
from tests.runtime.planned import Planned, planned
from txopt.runtime.artifact import Artifact


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the user's, with something in it that is none of our business; nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """What a test leaves undone on it fails the test."""
    fake = installed(monkeypatch, FakeCuda())
    yield fake
    gc.collect()
    assert fake.faults == []
    assert fake.left() == []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeTensorRT:
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, g2p: Artifact, artifacts: Callable[[str], Artifact]) -> Planned:
    """Artifacts with engines, by the model's name and what is otherwise; each made once."""
    folder, made = tmp_path_factory.mktemp("planned"), dict[str, Artifact]()

    def make(name: str, **otherwise: Any) -> Artifact:
        key = f"{name}-{len(made)}" if otherwise else name
        if otherwise or name not in made:
            made[key] = planned(g2p if name == "g2p" else artifacts(name), folder / key, **otherwise)
        return made[key]

    return make
