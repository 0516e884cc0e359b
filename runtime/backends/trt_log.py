"""What TensorRT's libraries say, heard by one logger for a process: they keep the first while anything made with it lives.

Who builds engines and who runs them share it, for either may be first. Knows the libraries by their module, whichever it is.
"""

from collections import deque
from functools import cache
from typing import Any

NO_REASON = "the library gives no reason"
_HARMLESS = ("has Int64 binding",)
_MOST, _TOLD = 256, 4  # messages that are kept, and that one error tells


def log_of(library: Any) -> Any:
    """The logger of ``library``, an ILogger: ``heard`` are warnings and errors since ``forget()``, and ``said()`` tells the errors."""
    return _made(library.ILogger)


@cache
def _made(base: Any) -> Any:
    class Log(base):  # type: ignore[misc]  # it is known only when it is there
        def __init__(self) -> None:
            super().__init__()
            self._heard: deque[tuple[bool, str]] = deque(maxlen=_MOST)

        def log(self, severity: Any, message: str) -> None:
            if severity <= base.Severity.WARNING and not any(each in message for each in _HARMLESS):
                self._heard.append((severity <= base.Severity.ERROR, message))

        @property
        def heard(self) -> list[str]:
            return [message for _, message in self._heard]

        def forget(self) -> None:
            self._heard.clear()

        def said(self) -> str:
            """The last errors, which are forgotten then with all else."""
            errors = [message for is_error, message in self._heard if is_error]
            self.forget()
            return "; ".join(errors[-_TOLD:]) or NO_REASON

    return Log()
