"""The page on the disk: there as a whole or not at all, and never over anything that is not one."""

import contextlib
import os
import secrets
from pathlib import Path

from txopt.runtime.errors import UsageError
from txopt.runtime.files import read, sync
from txopt.runtime.written import check_outside

# What pages begin with, by template.
MARKS = {
    "page.html": b"<!doctype html>\n<!-- written by txopt inspect -->\n",
    "quantization.html": b"<!doctype html>\n<!-- written by txopt quantize -->\n",
}
MARK = MARKS["page.html"]


def check(target: Path, *, overwrite: bool) -> None:
    """Raises UsageError if a page may not be written to ``target``."""
    folder = Path(os.path.realpath(target.parent))
    check_outside(folder / target.name)
    if not folder.is_dir():
        raise UsageError(f"{target}: expected a directory {target.parent} to write to, found none; make it first")
    if not os.path.lexists(target):
        return
    if not _is_page(target):
        raise UsageError(
            f"{target}: expected no file, or a page of txopt, found something else, which is never overwritten; "
            "choose another name"
        )
    if not overwrite:
        raise UsageError(f"{target}: a page is there already; choose another name, or overwrite it (--overwrite)")


def write(target: Path, page: str, *, overwrite: bool) -> None:
    """Puts ``page``, which begins with one of MARKS, at ``target``, at once.

    Raises:
        UsageError: it cannot be written, or something appeared there meanwhile.
    """
    draft = target.with_name(f".{target.name}.txopt-{secrets.token_hex(4)}.new")
    try:
        with draft.open("xb") as file:
            file.write(page.encode("utf-8", "replace"))  # a file's name may hold what UTF-8 cannot
        sync(draft)
        if overwrite and _is_page(target):
            os.replace(draft, target)
        else:
            _publish(draft, target)
    except FileExistsError as err:
        raise UsageError(f"{target}: something appeared there meanwhile; choose another name") from err
    except OSError as err:
        raise UsageError(f"{target}: cannot be written: {err.strerror or err}") from err
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _publish(draft: Path, target: Path) -> None:
    """A rename that replaces nothing."""
    try:
        os.link(draft, target)
    except FileExistsError:
        raise
    except OSError as err:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(target) from err
        os.rename(draft, target)


def _is_page(target: Path) -> bool:
    try:
        return target.is_file() and read(target, max(map(len, MARKS.values()))).startswith(tuple(MARKS.values()))
    except OSError:  # a link, which is not followed
        return False
