"""SOURCE as a user types it, to a ``Source``: a checkpoint's directory, a hub id in the local cache, or package.module:factory.

Owns the decision which door a source takes and what the manifest says of where it came from. Reading a checkpoint is
huggingface.py's work, the custom protocol custom_source.py's.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from txopt.exporter.borrowed import borrowed, rebuilt
from txopt.exporter.calls import calling
from txopt.exporter.source import Source
from txopt.runtime.errors import SourceError

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded source; ``directory`` is where tokenizer files may lie, ``origin`` the manifest's "source"."""

    source: Source
    directory: Path | None
    origin: dict[str, Any]
    tokenizers: dict[str, Path]


def load(source: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Checkpoint:
    """Opens ``source``: a string or path as the command line takes it, or a module itself, of transformers or one's own.

    Raises:
        SourceError: nothing there, nothing that txopt supports, or not cached where the machine is offline.
    """
    if not isinstance(source, (str, Path)):
        written_in = getattr(sys.modules.get(type(source).__module__), "__file__", None)
        return _in_memory(source, type(source).__qualname__, Path(written_in) if written_in else None, dtype)
    directory = Path(source)
    if directory.is_dir():
        return _checkpoint(directory, str(directory.name), dtype, trust_remote_code)
    text = str(source)
    if text.endswith(".onnx"):
        raise SourceError(
            f"{text}: expected a model, found the name of a graph; txopt optimize fuses a single .onnx file, and of what Optimum "
            "exported the whole folder is taken"
        )
    if _FACTORY.fullmatch(text):
        module, path = _call_factory(text)
        return _in_memory(module, text, path, dtype)
    if directory.exists() or not _HUB_ID.fullmatch(text):
        raise SourceError(
            f"{text}: expected a checkpoint's directory, a hub id, or package.module:factory, or a folder that Optimum exported"
        )
    return _checkpoint(_cached(text), text, dtype, trust_remote_code)


def _checkpoint(directory: Path, name: str, dtype: torch.dtype, trust_remote_code: bool) -> Checkpoint:
    from txopt.exporter import pretrained

    if not (directory / "config.json").is_file():
        raise SourceError(f"{directory}: expected a checkpoint, found no config.json in it")
    loaded = pretrained.load(directory, dtype, trust_remote_code=trust_remote_code)
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    origin = {"name": name, "kind": "checkpoint", "files": {file.name: _sha256(file) for file in files}}
    return Checkpoint(source=loaded, directory=directory, origin=origin, tokenizers={})


def _in_memory(module: Any, name: str, file: Path | None, dtype: torch.dtype) -> Checkpoint:
    """A module, which was written in ``file`` and stays as it is; tokenizers that it declares lie beside that."""
    from transformers import PreTrainedModel

    from txopt.exporter.custom_source import open_module
    from txopt.exporter.pretrained import adopt

    source: Source = adopt(module, dtype) if isinstance(module, PreTrainedModel) else open_module(_cast(module, dtype))
    state = hashlib.sha256()
    for key, value in sorted(source.module.state_dict().items()):
        state.update(key.encode())
        state.update(value.float().numpy().tobytes())
    origin = {"name": name, "kind": "custom", "state": state.hexdigest()}
    declared = getattr(source.module, "tokenizers", {}) or {}
    base = file.parent if file is not None else Path()
    tokenizers = {role: base / path for role, path in declared.items()}
    missing = [str(path) for path in tokenizers.values() if not path.is_file()]
    if missing:
        raise SourceError(f"{name} names tokenizers that are not there: {', '.join(missing)}")
    return Checkpoint(source=source, directory=None, origin=origin, tokenizers=tokenizers)


def _call_factory(text: str) -> tuple[torch.nn.Module, Path | None]:
    """The module that ``package.module:factory`` makes, and its file; the current directory counts as importable."""
    name, _, attribute = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        works = f"run txopt where `python -c 'import {name}'` works"
        with calling(f"{text}: cannot import {name}", works):
            imported = importlib.import_module(name)
        factory = getattr(imported, attribute, None)
        if not callable(factory):
            raise SourceError(f"{text}: {name} has no callable {attribute}")
        if isinstance(factory, torch.nn.Module):
            raise SourceError(
                f"{text}: expected a function, but {attribute} is a module itself ({type(factory).__name__}); "
                f"write one that returns it (def factory(): return {attribute}), or give it to txopt.export in Python"
            )
        if wanted := _required(factory):
            raise SourceError(
                f"{text}: expected a function without arguments, but {attribute} needs {', '.join(wanted)}; "
                "write one that gives them and returns the module, weights loaded"
            )
        with calling(f"{text}: {attribute}() failed", "call it in Python and mend what it raises"):
            module = factory()
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{text}: expected {attribute}() to return an nn.Module, {_instead(module)}")
    path = getattr(imported, "__file__", None)
    return module, Path(path) if path else None


def _instead(made: Any) -> str:
    """What a factory made that is no module, and what to do."""
    if made is None:
        return "got None (has it a return?); return the module, weights loaded"
    if isinstance(made, type):
        return f"got the class {made.__name__}; return {made.__name__}(...), weights loaded"
    if isinstance(made, Mapping) and made and all(isinstance(value, torch.Tensor) for value in made.values()):
        return "got a dict of tensors; make the module, give it these by load_state_dict() and return the module"
    kind = type(made).__name__
    return f"got a{'n' if kind[0] in 'aeiouAEIOU' else ''} {kind}; return the module alone, weights loaded"


def _required(factory: Callable[..., Any]) -> list[str]:
    """The arguments that a call has to give."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in variadic]


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """The module in ``dtype``: a copy, so that one that its owner goes on training stays as it is."""
    if not isinstance(module, torch.nn.Module):
        return module
    try:
        return borrowed(module).to(dtype)
    except Exception as err:  # what holds locks, files or generators cannot be copied
        if all(value.dtype == dtype for value in module.state_dict().values() if value.is_floating_point()):
            return rebuilt(module)
        name = type(module).__name__
        raise SourceError(f"{name} cannot be copied ({err}), and is not {dtype}; give it in that dtype") from err


def _cached(hub_id: str) -> Path:
    """A hub id's snapshot: from the local cache, else downloaded where a hub can be reached."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as err:  # the library raises a dozen kinds, by cause
        raise SourceError(
            f"{hub_id}: not a directory here, and not to be had from the hub ({type(err).__name__}); "
            "offline, give the directory of a checkpoint"
        ) from err


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
