"""An opened artifact: generate(), stream(), classify(), embed(), and the two graphs for those who write their own loop.

Owns how arguments split into tensors and generation options. Loops live in generate.py, buffers in row_decoder.py, text, audio and
images in pipeline.py. It knows no model family: what differs between them is data in the manifest.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.arrays import as_array
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.generate import GenerationResult, generate, tokens
from txopt.runtime.options import GenerationOptions
from txopt.runtime.pipeline import Pipeline
from txopt.runtime.row_decoder import RowDecoder
from txopt.runtime.session import Encoded, Session

Array = NDArray[Any]


def load(path: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None) -> "Model":
    """Opens the artifact at ``path``; needs numpy and the engine, not torch.

    Args:
        path: the artifact's directory.
        device: "cpu"; "cuda" for ONNX Runtime on a GPU, "cuda-graphs" for the same with a decoder's steps as CUDA graphs; "tensorrt"
            for the artifact's engines. ":N" behind the latter three means another GPU than the first.
        threads: engine threads, None for one per core.

    Raises:
        ArtifactError: it is damaged, unsafe, too new, or no artifact.
        UsageError: a device or a number of threads that is none.
        MissingDependencyError: the device needs a package that is not installed.
    """
    return Model(Artifact.open(path), device=device, threads=threads)


class Model:
    """See the module's docstring; made by ``load``, and by who asks what graphs mean ``as_written``."""

    def __init__(
        self, artifact: Artifact, *, device: str = "cpu", threads: int | None = None, as_written: bool = False
    ) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.session = Session(artifact, device=device, threads=threads, as_written=as_written)

    def encode(self, **inputs: Array) -> Encoded:
        """Runs the encoder once: memory [B,T,M] and the cross K/V, left on the engine's device."""
        return self.session.encode(inputs)

    def decode(self, encoded: Encoded | None = None, *, beams: int = 1, batch: int = 1) -> RowDecoder:
        """A decoder over fresh buffers: ``prefill``, ``step``, ``feed`` and ``reorder`` for a loop of your own."""
        return self.session.decoder(encoded, beams=beams, batch=batch)

    def generate(self, **arguments: Any) -> GenerationResult:
        """Ids for a batch of sources, as transformers' generate() gives them.

        Args:
            arguments: the encoder's inputs by name (a decoder alone takes input_ids and attention_mask of its prompt, padded on the
                left), ``decoder_input_ids`` int64 [B,P] to start from, and transformers' options: max_new_tokens, num_beams, ...

        Raises:
            InputError: tensors that do not fit. UsageError: options that do not exist or contradict each other.
        """
        return generate(**self.prepare(arguments))

    def stream(self, **arguments: Any) -> Iterator[NDArray[np.int64]]:
        """Like generate(), for one beam: yields the next token of every row, int64 [B], as soon as it is chosen."""
        return tokens(**self.prepare(arguments))

    def classify(self, **inputs: Array) -> Array:
        """Scores float32: [B,labels] for texts, [B,T,labels] for tokens; ``labels`` names them.

        Probabilities of one label among all, or of each label by itself, or a regression's values: as the checkpoint says.
        """
        logits = self._output("logits", inputs)
        scores = self.manifest.frontend.get("scores", "softmax")
        if scores == "none":
            return logits
        if scores == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-logits)))
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(exponents / exponents.sum(-1, keepdims=True))

    def embed(self, **inputs: Array) -> Array:
        """One embedding per source, float32 [B,M], pooled and normalised as the checkpoint says."""
        return self._output("embedding", inputs)

    @property
    def labels(self) -> list[str]:
        """Names of a classifier's classes; empty for other models."""
        named: Mapping[str, str] = self.manifest.frontend.get("labels") or {}
        return [named[str(index)] for index in range(len(named))]

    def pipeline(self, kind: str | None = None) -> Pipeline:
        """Text, audio or images in, text out; ``kind`` ("text", "audio", "image") is checked where it is given."""
        return Pipeline(self, kind)

    def _output(self, name: str, inputs: Mapping[str, Array]) -> Array:
        if self.manifest.kind != "encoder" or name not in {
            item.name for item in self.manifest.graphs["encoder"].outputs
        }:
            raise UsageError(
                f"this artifact ({self.manifest.kind}, {self.manifest.task}) has no {name}; expected an encoder that gives it"
            )
        return self.session.array(self.session.encode(inputs).values[name])

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What generate() and tokens() of generate.py take, the encoder run already; errors as ``generate``."""
        names = (
            {item.name for item in self.manifest.graphs["encoder"].inputs}
            if "encoder" in self.manifest.graphs
            else set()
        )
        names |= {"input_ids", "attention_mask", "decoder_input_ids"}
        tensors = {
            name: as_array(name, value) for name, value in arguments.items() if name in names and value is not None
        }
        overrides = {name: value for name, value in arguments.items() if name not in names}
        options = GenerationOptions.merge(self.manifest.generation, overrides)
        if self.manifest.kind == "decoder":
            prompt = tensors.get("input_ids")
            if prompt is None or prompt.ndim != 2:
                raise InputError(
                    "input_ids: expected the prompt, int64 [B,P], got "
                    + ("nothing" if prompt is None else str(prompt.shape))
                )
            self._check_ids("input_ids", prompt)
            batch = len(prompt)
            return {
                "open_decoder": lambda beams: self.session.decoder(None, beams=beams, batch=batch),
                "prompt": prompt,
                "prompt_mask": tensors.get("attention_mask"),
                "encoder_ids": prompt,
                "options": options,
            }
        start = tensors.pop("decoder_input_ids", None)
        encoded = self.session.encode(tensors)
        prompt = self._start(encoded.batch, options) if start is None else start
        if prompt.shape[:1] != (encoded.batch,) or prompt.ndim != 2 or not prompt.size:
            raise InputError(f"decoder_input_ids: expected int64 [{encoded.batch},P], got {list(prompt.shape)}")
        self._check_ids("decoder_start_token_id" if start is None else "decoder_input_ids", prompt)
        return {
            "open_decoder": lambda beams: self.session.decoder(encoded, beams=beams),
            "prompt": prompt,
            "encoder_ids": tensors.get("input_ids"),
            "options": options,
        }

    def _check_ids(self, name: str, ids: Array) -> None:
        """Refuses ids that the decoder does not know, by the name they came under; what are no ids is the loop's to refuse."""
        decoder = self.manifest.graphs.get("decoder")
        if decoder is None or ids.dtype.kind not in "iu" or not ids.size:
            return
        vocabulary = int(next(item for item in decoder.outputs if item.name == "logits").axes[-1])
        least, largest = int(ids.min()), int(ids.max())
        if least < 0 or largest >= vocabulary:
            found = least if least < 0 else largest
            raise InputError(f"{name}: expected ids of this model's vocabulary, 0 to {vocabulary - 1}, got {found}")

    def _start(self, batch: int, options: GenerationOptions) -> NDArray[np.int64]:
        if options.decoder_start_token_id is None:
            raise UsageError("this model has no decoder_start_token_id: give decoder_input_ids")
        prompt = [options.decoder_start_token_id]
        if self.manifest.frontend["type"] == "audio":
            from txopt.runtime.audio import decoder_prompt

            prompt = decoder_prompt(self.manifest.frontend, self.manifest.generation)
        return np.tile(np.asarray(prompt, np.int64), (batch, 1))
