"""Fixtures of more than one file here."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the user's, with something in it that is none of our business; nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    return folder
