"""Text, audio or images in, text out: an artifact's front end around a model.

Owns the order of the steps; what each step does lives in text.py, audio.py and image.py, chosen by the manifest's "frontend".
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from txopt.runtime.model import Model

Feeds = dict[str, NDArray[Any]]


class Pipeline:
    """Callable: sources in, texts out. ``prepare`` and ``text`` are its two halves.

    Args:
        model: the opened artifact.
        kind: "text", "audio" or "image", checked against the artifact where it is given.
    """

    def __init__(self, model: "Model", kind: str | None = None) -> None:
        self._model, self._frontend = model, model.manifest.frontend
        self.kind = str(self._frontend["type"])
        if kind is not None and kind != self.kind:
            hint = "give arrays: model.generate(input_ids=...)" if self.kind == "arrays" else f"use {self.kind!r}"
            raise UsageError(f"this artifact takes {self.kind}, not {kind}; {hint}")
        directory = model.artifact.path
        self._input: Any = None
        self._text: Any = None
        if self.kind == "text":
            from txopt.runtime.text import TextFrontend

            self._input = self._text = TextFrontend(directory, self._frontend)
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
        single = isinstance(sources, str)
        if not isinstance(sources, (str, Sequence)):
            raise InputError(f"expected a source or a list of them, got {type(sources).__name__}")
        feeds, options = self.prepare([sources] if single else list(sources), **options)
        result = self._model.generate(**feeds, **options)
        texts = [self.text(row) for row in result.sequences[:, self._skipped(feeds) :]]
        return texts[0] if single and len(texts) == 1 else texts

    def prepare(self, sources: Sequence[Any], **options: Any) -> tuple[Feeds, dict[str, Any]]:
        """Feeds, and the generation options: languages and tasks turned into ids, everything else as it was.

        ``source_language``, ``target_language`` (text); ``language``, ``task`` (speech).
        """
        if self._input is None:
            raise UsageError("this artifact has no tokenizer or processor: give arrays, model.generate(input_ids=...)")
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
            feeds["decoder_input_ids"] = np.tile(np.asarray(prompt, np.int64), (len(sources), 1))
        return feeds, options

    def text(self, ids: NDArray[np.int64]) -> str:
        """Ids to text, special tokens left out; the ids themselves where the artifact has no tokenizer."""
        if self._text is None:
            return " ".join(map(str, ids.tolist()))
        return str(self._text.decode(ids))

    def stream(self, source: Any, **options: Any) -> Iterator[str]:
        """Text of one source, piece by piece; the pieces joined are the whole text."""
        feeds, options = self.prepare([source], **options)
        ids: list[int] = []
        said = ""
        for token in self._model.stream(**feeds, **options):
            ids.append(int(token[0]))
            text = self.text(np.asarray(ids))
            if text.startswith(said) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character may follow
                yield text[len(said) :]
                said = text

    def _skipped(self, feeds: Feeds) -> int:
        """Tokens of a result that are not to be read: a decoder's own prompt is its text, a start prompt is none."""
        return (
            0
            if self._model.manifest.kind == "decoder"
            else feeds["decoder_input_ids"].shape[1]
            if "decoder_input_ids" in feeds
            else 1
        )
