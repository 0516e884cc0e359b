"""SIGTERM as an exception, so that whatever is half written is removed as on Ctrl-C.

Python ends at once on SIGTERM; schedulers, containers and ``timeout`` send it. Who asks decides where: nothing happens at import,
and a program that has a handler of its own, or ignores the signal, keeps that.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no Exception, so that nothing takes it for a failure and goes on."""


@contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, the first SIGTERM raises Terminated in the main thread; later ones do not disturb the cleaning."""
    is_main = threading.current_thread() is threading.main_thread()  # others may set no handlers
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
