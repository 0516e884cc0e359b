"""Calls of code that is not ours: what it raised, told with the line of its own that did.

Owns the words for it. What was asked of that code, and what its owner may do, say those who call it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from txopt.runtime.errors import SourceError, TxoptError

# Whose lines say nothing to the owner of the code that called them.
_LIBRARIES = {"torch", "transformers", "numpy", "onnxscript", "txopt"} | sys.stdlib_module_names
_EXAMPLES = "txopt.examples"


@contextmanager
def calling(what: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside, ``SystemExit`` included, is the source's fault.

    Raises:
        SourceError: ``what``, the error with its line, ``advice``. Errors of txopt's own pass.
    """
    try:
        yield
    except TxoptError:
        raise
    except (Exception, SystemExit) as err:
        raise SourceError(f"{what}: {told(err)}; {advice}") from err


def shapes(given: Mapping[str, Tensor]) -> str:
    """``input_ids [2,7], tokens [2,5]``."""
    return ", ".join(f"{name} [{','.join(map(str, value.shape))}]" for name, value in given.items())


def told(err: BaseException) -> str:
    """``KeyError: 'head' (model.py, line 12)``."""
    place = _place(err)
    return f"{_words(err)} ({place})" if place else _words(err)


def first_line(err: BaseException) -> str:
    """As ``told``, of an error that torch may have made of another, with pages of text: the one that came of a line of the owner's."""
    chain = [err]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    found = next((each for each in chain if _place(each)), chain[min(1, len(chain) - 1)])
    said, place = _words(found).split("\n")[0], _place(found)
    return f"{said} ({place})" if place else said


def _words(err: BaseException) -> str:
    said = str(err).strip()
    return f"{type(err).__name__}: {said}" if said else type(err).__name__


def _place(err: BaseException) -> str:
    """The innermost line that is no library's, or nothing."""
    place, step = "", err.__traceback__
    while step is not None:
        name, file = str(step.tb_frame.f_globals.get("__name__", "")), step.tb_frame.f_code.co_filename
        theirs = name.partition(".")[0] not in _LIBRARIES or name.startswith(_EXAMPLES)
        if theirs and not file.startswith("<"):
            place = f"{_shortest(file)}, line {step.tb_lineno}"
        step = step.tb_next
    return place


def _shortest(file: str) -> str:
    """A file's path from here where it is below, else its whole one."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
