"""What commands need around them: the packages of an extra, and silence of those that talk on their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from txopt.runtime.errors import MissingDependencyError


@contextmanager
def needs_exporter() -> Iterator[None]:
    """Raises MissingDependencyError where a package of the export extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as err:
        raise MissingDependencyError(f'this command needs {err.name}: pip install "txopt[export]"') from err


def without_network_noise() -> None:
    """transformers draws progress bars of its own and warns about optional packages: neither is the user's business here."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
