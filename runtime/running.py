"""What ``txopt run`` does: one request, from whatever the user has, to text or ids.

Owns which input fits which artifact, what a result looks like, and messages in the command line's words where the
library's would name what nobody typed; the command line owns the options.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.frontend import kind_of
from txopt.runtime.generate import tokens
from txopt.runtime.model import Model, load
from txopt.runtime.options import COLDEST

Result = tuple[dict[str, Any], str]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Exactly one of text ("-": lines of stdin), audio, image and ids; generation options by name."""

    text: str | None = None
    audio: Path | None = None
    image: Path | None = None
    ids: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def run(
    path: Path,
    request: Request,
    *,
    device: str = "cpu",
    threads: int | None = None,
    pieces: Callable[[str], None] | None = None,
) -> Iterator[Result]:
    """A (JSON document, text) for each source; of a blank line too, an empty one, so that answers match questions.

    Args:
        pieces: called with every piece of text, or of a row of ids, as it is generated; one source only.

    Raises:
        InputError: an input that cannot be read or does not fit. UsageError: no input or several, one that the artifact
            does not take, or options that cannot work.
    """
    given = [name for name in ("text", "audio", "image", "ids") if getattr(request, name) is not None]
    if len(given) != 1:
        found = "none" if not given else " and ".join(f"--{name}" for name in given)
        raise UsageError(f"expected one of --text, --audio, --image, --ids, got {found}")
    _check_temperature(request.options.get("temperature"))
    model = load(path, device=device, threads=threads)
    kind = given[0]
    if model.manifest.kind == "encoder" and (request.options or pieces is not None):
        asked = ", ".join(request.options) or "stream"
        raise UsageError(f"this artifact ({model.manifest.task}) generates nothing: leave out {asked}")
    if kind == "ids":
        yield _run_arrays(model, _arrays(request.ids), request.options, pieces)
        return
    _check_kind(model, kind)
    if model.manifest.kind == "encoder":
        yield from _run_encoder(model, _texts(request.text), kind)
        return
    pipeline = model.pipeline(kind)
    for source in _texts(request.text) if kind == "text" else [request.audio or request.image]:
        if source is None:
            yield {"text": "", "ids": []}, ""
            continue
        if pieces is not None:
            said = []
            for piece in pipeline.stream(source, **request.options):
                pieces(piece)
                said.append(piece)
            yield {"text": "".join(said)}, ""
            continue
        feeds, options = pipeline.prepare([source], **request.options)
        result = model.generate(**feeds, **options)
        text = pipeline.text(pipeline.said(result.sequences, feeds, options)[0])
        yield {"text": text, "ids": result.sequences[0].tolist()}, text


def _check_temperature(temperature: float | None) -> None:
    """A temperature asks for sampling, so one that cannot be sampled with is said here, in words of the options."""
    if temperature is not None and not temperature >= COLDEST:
        raise UsageError(
            f"--temperature {temperature:g}: expected a number above 0 ({COLDEST:g} is the least that can be sampled with); "
            "for the likeliest token at every step leave out --temperature, --top-k, --top-p and --seed"
        )


def _check_kind(model: Model, kind: str) -> None:
    """Refuses what the artifact's front end does not take, and names the option that gives it what it does."""
    taken = kind_of(model.manifest.frontend)
    if taken == "arrays":
        graph = model.manifest.graphs.get("encoder")
        names = ["input_ids", "attention_mask"] if graph is None else [item.name for item in graph.inputs]
        raise UsageError(
            f"this artifact has no tokenizer or processor for --{kind}: give its inputs as arrays, --ids FILE.npz with "
            + " and ".join(names)
        )
    if kind != taken:
        raise UsageError(f"this artifact takes {taken}, not {kind}: use --{taken}")


def _texts(text: str | None) -> Iterator[str | None]:
    """The text, or the lines of stdin; None for a blank one."""
    if text != "-":
        yield str(text)
        return
    found = False
    for line in sys.stdin:
        found = True
        yield line.rstrip("\n") if line.strip() else None
    if not found:
        raise InputError("stdin: expected at least one line of text, got none")


def _arrays(path: Path | None) -> dict[str, Any]:
    try:
        archive = np.load(str(path), allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("one array without a name")
        with archive:
            return {name: archive[name] for name in archive.files}
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (ValueError, EOFError) as err:  # numpy's own text recommends pickle
        raise InputError(f"{path}: expected an .npz archive of the encoder's inputs by name") from err


def _run_arrays(
    model: Model, arrays: Mapping[str, Any], options: Mapping[str, Any], pieces: Callable[[str], None] | None
) -> Result:
    if model.manifest.kind == "encoder":
        values = model.encode(**arrays).values
        outputs = {name: model.session.array(value).tolist() for name, value in values.items()}
        return {"outputs": outputs}, "\n".join(f"{name}: {value}" for name, value in outputs.items())
    if pieces is not None:
        return _stream_ids(model, {**arrays, **options}, pieces)
    sequences = model.generate(**{**arrays, **options}).sequences.tolist()
    return {"ids": sequences}, "\n".join(" ".join(map(str, row)) for row in sequences)


def _stream_ids(model: Model, arguments: Mapping[str, Any], pieces: Callable[[str], None]) -> Result:
    """A row of ids as it comes, the prompt first: the pieces joined are the line that is printed without a stream."""
    call = model.prepare(arguments)
    rows = len(call["prompt"]) * call["options"].num_return_sequences
    if rows != 1:
        raise UsageError(
            f"--stream prints one row of ids as it comes, got {rows}: give one source, or leave out --stream"
        )
    following = tokens(**call)  # refuses what it can before anything is printed
    row: list[int] = call["prompt"][0].tolist()
    pieces(" ".join(map(str, row)))
    for chosen in following:
        row.append(int(chosen[0]))
        pieces(f" {row[-1]}")
    return {"ids": [row]}, ""


def _run_encoder(model: Model, texts: Iterator[str | None], kind: str) -> Iterator[Result]:
    frontend = model.pipeline(kind)
    for text in texts:
        if text is None:
            yield {"text": ""}, ""
            continue
        feeds, _ = frontend.prepare([text])
        if model.manifest.task == "embedding":
            vector = model.embed(**feeds)[0]
            yield {"text": text, "embedding": vector.tolist()}, " ".join(f"{x:.5f}" for x in vector)
            continue
        scores = model.classify(**feeds)[0]
        yield _labelled(text, scores, model.labels or [str(index) for index in range(scores.shape[-1])])


def _labelled(text: str, scores: Any, labels: Sequence[str]) -> Result:
    """The best class of a text, or of each of its tokens."""
    if scores.ndim == 1:
        named = {label: float(score) for label, score in zip(labels, scores, strict=True)}
        best = max(named, key=named.__getitem__)
        return {"text": text, "label": best, "scores": named}, f"{best} {named[best]:.3f}"
    best_each = [labels[index] for index in scores.argmax(-1)]
    return {"text": text, "labels": best_each}, " ".join(best_each)
