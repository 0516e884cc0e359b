"""What a person sees: results on stdout, progress and warnings on stderr, errors as one message and an exit code.

A progress line with elapsed time where a person waits at a terminal, plain lines where none is attached. It knows no command.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from txopt.runtime.errors import TxoptError

_SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Told where the work is."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """``stage`` begins, or has ``done`` of ``total`` behind it."""


class Console:
    """Where a command writes. ``quiet`` silences progress, never results or errors."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet, self._as_json = quiet, as_json

    def result(self, document: dict[str, Any] | list[dict[str, Any]], text: str) -> None:
        """The command's one result: ``document`` with --json, else ``text``."""
        print(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) if self._as_json else text, flush=True)

    def note(self, text: str) -> None:
        if not self._quiet:
            _say(text)

    @contextmanager
    def stages(self, names: tuple[str, ...]) -> Iterator[Report]:
        """A function to call as each stage begins, and with (stage, done, total) while it lasts; shows where the work is."""
        if self._quiet:
            yield lambda stage, done=0, total=0: None
        elif sys.stderr.isatty():
            with _bar(names) as advance:
                yield advance
        else:
            yield _lines(names)


@contextmanager
def _bar(names: tuple[str, ...]) -> Iterator[Report]:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=RichConsole(stderr=True), transient=True) as progress:
        stages = progress.add_task(names[0], total=len(names))
        within = progress.add_task("", total=None, visible=False)

        def advance(stage: str, done: int = 0, total: int = 0) -> None:
            progress.update(stages, description=stage, completed=names.index(stage))
            if done <= 1 or not total:
                progress.reset(within, total=total or None, visible=bool(total))
            progress.update(within, completed=done)

        yield advance


def _lines(names: tuple[str, ...]) -> Report:
    start = time.monotonic()
    said = began = start

    def line(stage: str, done: int = 0, total: int = 0) -> None:
        nonlocal said, began
        now = time.monotonic()
        left = ""
        if total:
            if done < total and now - said < _SECONDS_BETWEEN_LINES:
                return
            left = f" {done} of {total}" + (
                f", about {(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
            )
        else:
            began = now
        said = now
        _say(f"[{names.index(stage) + 1}/{len(names)}] {stage}{left} ({now - start:.0f} s)")

    return line


def _say(text: str) -> None:
    """On stderr. Where nobody reads it any more, work goes on all the same: its result is what was asked for."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("txopt").setLevel(level)


def fail(error: TxoptError) -> int:
    """Prints the error, gives its exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code
