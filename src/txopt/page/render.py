"""The template filled in. Every text is escaped: names in foreign files are whatever someone wrote there."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from txopt.page.file import MARK
from txopt.runtime.errors import MissingDependencyError


def render(content: Mapping[str, Any]) -> str:
    """The page; ``content`` is what ``content.of_artifact`` and ``content.of_onnx`` make.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as err:
        raise MissingDependencyError(f'--html needs {err.name}: pip install "txopt[export]"') from err
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("txopt.page").joinpath("page.html").read_text("utf-8"))
    return MARK.decode() + template.render(content)
