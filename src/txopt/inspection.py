"""``txopt inspect``: what is in an artifact, a .onnx file or a file of ranges, as a document and in lines, or as a page."""

from pathlib import Path
from typing import Any

from txopt.runtime.errors import UsageError


def inspect(path: Path, *, html: Path | None = None, overwrite: bool = False) -> tuple[dict[str, Any], str]:
    """(document, text) of what is at ``path``; writes a page to ``html``.

    Args:
        path: an artifact's directory; a .onnx file, which is parsed in a process of its own; or a .json file of ranges.
        html: the file to make; it is there as a whole or not at all.
        overwrite: replace a page that an earlier inspection left at ``html``; anything else there is never touched.

    Raises:
        UsageError: ``html`` may not be written. SourceError: ``path`` is no ONNX file. ArtifactError: it is no intact artifact, or
            holds no ranges.
        MissingDependencyError: a package that the page or the parser needs is not installed.
    """
    if path.suffix == ".json" and not path.is_dir():
        if html is not None or overwrite:
            raise UsageError("--html is for artifacts and .onnx files; txopt quantize --report draws ranges")
        return _of_ranges(path)
    if html is None:
        if overwrite:
            raise UsageError("--overwrite replaces a page: give its name with --html")
    else:
        from txopt.page import file

        file.check(html, overwrite=overwrite)
    is_graph = path.suffix == ".onnx" and not path.is_dir()
    document, text, page = _of_onnx(path, html) if is_graph else _of_artifact(path, html)
    if html is None or page is None:
        return document, text
    file.write(html, page, overwrite=overwrite)
    return {**document, "html": str(html)}, f"{text}\n  page: {html}"


def _of_ranges(path: Path) -> tuple[dict[str, Any], str]:
    from txopt.calibration.ranges import Ranges
    from txopt.summary import of_ranges

    document = Ranges.open(path).to_json()
    return document, of_ranges(document, str(path))


def _of_onnx(path: Path, html: Path | None) -> tuple[dict[str, Any], str, str | None]:
    from txopt.exporter import foreign
    from txopt.summary import of_onnx

    document, picture = foreign.picture(path)
    if html is None:
        return document, of_onnx(document), None
    from txopt.page import content
    from txopt.page.render import render

    return document, of_onnx(document), render(content.of_onnx(document, picture))


def _of_artifact(path: Path, html: Path | None) -> tuple[dict[str, Any], str, str | None]:
    from txopt.runtime.artifact import Artifact
    from txopt.summary import of_artifact

    artifact = Artifact.open(path)
    document, text = of_artifact(artifact)
    if html is None:
        return document, text, None
    from txopt.exporter import foreign
    from txopt.page import content
    from txopt.page.render import render
    from txopt.runtime.manifest import KINDS

    manifest = artifact.manifest
    picture = foreign.stored(path, {name: manifest.graphs[name].file for name in KINDS[manifest.kind]})
    return document, text, render(content.of_artifact(manifest, str(path), picture))
