"""What a person sees: results on stdout, progress and warnings on stderr, errors as one message and an exit code.

A progress line with elapsed time where a person waits at a terminal, plain lines where none is attached. It knows no command.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from txopt.runtime.errors import TxoptError


class Console:
    """Where a command writes. ``quiet`` silences progress, never results or errors."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet, self._as_json = quiet, as_json

    def result(self, document: dict[str, Any] | list[dict[str, Any]], text: str) -> None:
        """The command's one result: ``document`` with --json, else ``text``."""
        print(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) if self._as_json else text, flush=True)

    def note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stages(self, names: tuple[str, ...]) -> Iterator[Callable[[str], None]]:
        """A function to call as each stage begins; shows where the work is, and for how long."""
        if self._quiet:
            yield lambda stage: None
        elif sys.stderr.isatty():
            with _bar(names) as advance:
                yield advance
        else:
            yield _lines(names)


@contextmanager
def _bar(names: tuple[str, ...]) -> Iterator[Callable[[str], None]]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=RichConsole(stderr=True), transient=True) as progress:
        task = progress.add_task(names[0], total=len(names))
        yield lambda stage: progress.update(task, description=stage, completed=names.index(stage))


def _lines(names: tuple[str, ...]) -> Callable[[str], None]:
    start = time.monotonic()

    def line(stage: str) -> None:
        passed = time.monotonic() - start
        print(f"[{names.index(stage) + 1}/{len(names)}] {stage} ({passed:.0f} s)", file=sys.stderr, flush=True)

    return line


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("txopt").setLevel(level)


def fail(error: TxoptError) -> int:
    """Prints the error, gives its exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code
