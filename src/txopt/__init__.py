"""The public API of txopt, and nothing else: every name is imported from its home when it is first used.

``import txopt`` therefore costs a few milliseconds and imports neither numpy nor an engine. Where a name lives is
written in ``_HOMES``; what it does is documented there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from txopt.exporter.pipeline import export
    from txopt.exporter.quantize import quantize
    from txopt.runtime.artifact import Artifact
    from txopt.runtime.errors import (
        ArtifactError,
        InputError,
        LossError,
        MissingDependencyError,
        ParityError,
        SourceError,
        TxoptError,
        UsageError,
    )
    from txopt.runtime.model import load
    from txopt.runtime.parity import ParityReport, verify

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "InputError",
    "LossError",
    "MissingDependencyError",
    "ParityError",
    "ParityReport",
    "SourceError",
    "TxoptError",
    "UsageError",
    "__version__",
    "export",
    "load",
    "quantize",
    "verify",
]

_HOMES = {
    "export": "txopt.exporter.pipeline",
    "load": "txopt.runtime.model",
    "quantize": "txopt.exporter.quantize",
    "verify": "txopt.runtime.parity",
    "Artifact": "txopt.runtime.artifact",
    "ParityReport": "txopt.runtime.parity",
    "ArtifactError": "txopt.runtime.errors",
    "InputError": "txopt.runtime.errors",
    "LossError": "txopt.runtime.errors",
    "MissingDependencyError": "txopt.runtime.errors",
    "ParityError": "txopt.runtime.errors",
    "SourceError": "txopt.runtime.errors",
    "TxoptError": "txopt.runtime.errors",
    "UsageError": "txopt.runtime.errors",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home, once."""
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
