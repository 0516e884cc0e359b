"""Text, audio or images in, text out: an artifact's front end around a model.

Owns the order of the steps; what each step does lives in text.py, audio.py and image.py, chosen by the manifest's "frontend".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.frontend import kind_of

if TYPE_CHECKING:
    from txopt.runtime.model import Model

Feeds = dict[str, NDArray[Any]]

_EXPECTED = {
    "text": "a str or a list of them (ids go to model.generate(input_ids=...))",
    "audio": "a list of paths, open files or float arrays of samples; put one sound into a list: [samples]",
    "image": "a list of paths, open files or Pillow images; put one image into a list: [image]",
}


class Pipeline:
    """Callable: sources in, texts out. ``prepare`` and ``text`` are its two halves.

    Args:
        model: the opened artifact.
        kind: "text", "audio" or "image", checked against the artifact where it is given.
    """

    def __init__(self, model: "Model", kind: str | None = None) -> None:
        self._model, self._frontend = model, model.manifest.frontend
        self.kind = kind_of(self._frontend)
        if kind is not None and kind != self.kind:
            hint = "give arrays: model.generate(input_ids=...)" if self.kind == "arrays" else f"use {self.kind!r}"
            raise UsageError(f"this artifact takes {self.kind}, not {kind}; {hint}")
        directory = model.artifact.path
        self._input: Any = None
        self._text: Any = None
        if self.kind == "text":
            from txopt.runtime.text import TextFrontend

            self._input = self._text = TextFrontend(directory, self._frontend)
        elif self._frontend["type"] == "waveform":
            from txopt.runtime.waveform import WaveformFrontend

            self._input = WaveformFrontend(self._frontend)
        elif self.kind == "audio":
            from txopt.runtime.audio import AudioFrontend

            self._input = AudioFrontend(self._frontend)
        elif self.kind == "image":
            from txopt.runtime.image import ImageFrontend

            self._input = ImageFrontend(self._frontend)
        if self._text is None and "tokenizer" in self._frontend:
            from txopt.runtime.text import TextDecoder

            self._text = TextDecoder(directory, self._frontend)

    def __call__(self, sources: str | Sequence[Any], **options: Any) -> Any:
        """The texts of ``sources``, a list; one str for one str."""
        feeds, options = self.prepare(sources, **options)
        result = self._model.generate(**feeds, **options)
        texts = [self.text(row) for row in self.said(result.sequences, feeds, options)]
        return texts[0] if isinstance(sources, str) and len(texts) == 1 else texts

    def prepare(self, sources: str | Sequence[Any], **options: Any) -> tuple[Feeds, dict[str, Any]]:
        """Feeds, and the generation options: languages and tasks turned into ids, everything else as it was.

        ``source_language``, ``target_language`` (text); ``language``, ``task`` (speech).

        Raises:
            InputError: what is not a list of this artifact's kind of sources, or one str.
        """
        if self._input is None:
            raise UsageError("this artifact has no tokenizer or processor: give arrays, model.generate(input_ids=...)")
        if isinstance(sources, str):
            sources = [sources]
        if not isinstance(sources, Sequence) or isinstance(sources, (bytes, bytearray)):
            raise InputError(f"expected {_EXPECTED[self.kind]}; got {type(sources).__name__}")
        if self.kind != "audio":
            _leave_out(options, ("language", "task"), "speech")
        if self.kind != "text":
            _leave_out(options, ("source_language", "target_language"), "text")
        if self.kind == "text":
            source, target = options.pop("source_language", None), options.pop("target_language", None)
            feeds = self._input.encode(sources, source_language=source, target_language=target)
            forced = self._input.forced_bos_token_id(target)
            return feeds, options if forced is None else {"forced_bos_token_id": forced, **options}
        feeds = self._input.encode(sources)
        if self.kind == "audio":
            from txopt.runtime.audio import decoder_prompt

            language, task = options.pop("language", None), options.pop("task", None)
            prompt = decoder_prompt(self._frontend, self._model.manifest.generation, language=language, task=task)
            start = options.pop("decoder_input_ids", None)
            feeds["decoder_input_ids"] = (
                np.tile(np.asarray(prompt, np.int64), (len(sources), 1)) if start is None else start
            )
        return feeds, options

    def text(self, ids: NDArray[np.int64]) -> str:
        """Ids to text, special tokens left out; the ids themselves where the artifact has no tokenizer."""
        if self._text is None:
            return " ".join(map(str, ids.tolist()))
        return str(self._text.decode(ids))

    def stream(self, source: Any, **options: Any) -> Iterator[str]:
        """Text of one source, piece by piece; the pieces joined are the whole text."""
        feeds, options = self.prepare([source], **options)
        ids: list[int] = feeds["input_ids"][0].tolist() if self._model.manifest.kind == "decoder" else []
        said = 0
        for token in self._model.stream(**feeds, **options):
            ids.append(int(token[0]))
            settled = self._settled(np.asarray(ids))
            if len(settled) > said:
                yield settled[said:]
                said = len(settled)
        rest = self.text(np.asarray(ids, np.int64))[said:]  # what the next token might have changed
        if rest:
            yield rest

    def said(self, sequences: NDArray[np.int64], feeds: Feeds, options: Mapping[str, Any]) -> NDArray[np.int64]:
        """The columns of generate()'s ``sequences`` to be read: a decoder's own prompt is its text, a start prompt is none."""
        if self._model.manifest.kind == "decoder":
            return sequences
        start = options.get("decoder_input_ids", feeds.get("decoder_input_ids"))
        return sequences[:, 1 if start is None else np.shape(start)[1] :]

    def _settled(self, ids: NDArray[np.int64]) -> str:
        return self.text(ids) if self._text is None else str(self._text.settled(ids))


def _leave_out(options: dict[str, Any], names: Sequence[str], kind: str) -> None:
    """Takes ``names`` that are None out of ``options``.

    Raises:
        UsageError: one of them is given.
    """
    given = [name for name in names if options.pop(name, None) is not None]
    if given:
        raise UsageError(f"{given[0]} is for models that read {kind}, which this one does not: leave it out")
