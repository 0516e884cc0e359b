"""The documentation's Python runs as it stands: every ```python block of a page, in order, in one namespace."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _run(page: str) -> dict[str, Any]:
    text = (DOCS / page).read_text("utf-8")
    blocks = list(_BLOCK.finditer(text))
    assert blocks, f"{page} has no Python"
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))  # so that a traceback points into the page
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with what embedding.md asks for."""
    import txopt

    folder = tmp_path_factory.mktemp("docs")
    txopt.export("txopt.examples.g2p.model:factory", folder / "g2p-out")
    return folder


@pytest.mark.slow
def test_every_snippet_of_the_embedding_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _run("embedding.md")


@pytest.mark.slow
def test_every_snippet_of_the_custom_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    try:
        _run("custom-models.md")
    finally:
        torch.set_num_threads(threads)


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    broken = []
    for page in [root / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if not target.startswith(("http://", "https://")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken
