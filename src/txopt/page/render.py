"""A template filled in. Every text is escaped: names in foreign files are whatever someone wrote there."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from txopt.page.file import MARKS
from txopt.runtime.errors import MissingDependencyError


def check(option: str) -> None:
    """Raises MissingDependencyError if jinja2, which ``option`` needs, is not installed."""
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as err:
        raise MissingDependencyError(f'{option} needs {err.name}: pip install "txopt[export]"') from err


def render(content: Mapping[str, Any], template: str = "page.html") -> str:
    """The page; ``content`` is what ``content.of_artifact`` and ``content.of_onnx`` make, or what ``template`` asks for.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    check("--html")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("txopt.page").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return MARKS[template].decode() + environment.get_template(template).render(content)
