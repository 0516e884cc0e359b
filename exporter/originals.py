"""The files of an Optimum export, run as they are: the reference that an artifact made of them is held against.

``Originals`` answers reference.py's questions as other sources do, through ONNX Runtime. Search is transformers' own generate(), to
which ``_Model`` shows the files as one of its models: without a cache, so that every token is computed from the whole sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from txopt.exporter.huggingface_facts import facts_of
from txopt.exporter.optimum_folder import Folder
from txopt.exporter.source import KV, Forward, Generated
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import SourceError, TxoptError

Array = NDArray[Any]

MEMORY, MASK, BRANCH = "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"


class Originals:
    """See ``source.Source``; there is nothing to trace here.

    Args:
        folder: the export.
        past: the shapes of the merged decoder's past K/V, by input, their lengths 1; empty where it takes none.

    Raises:
        SourceError: ONNX Runtime does not open the files.
    """

    def __init__(self, folder: Folder, past: Mapping[str, Sequence[int]]) -> None:
        self._encoder, self._decoder = _opened(folder.encoder), _opened(folder.decoder)
        self._past = past if folder.merged else {}
        self._merged = folder.merged
        self.module: Any = _Model(folder.config, self)
        self.module.generation_config = folder.generation()
        self.traced: nn.Module = self.module
        self.facts = facts_of(self.module, folder.family)

    def memory(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The encoder's states [B,T,M]."""
        answers = self._encoder.run({name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(self._encoder.array(next(iter(answers.values()))))

    def decoded(self, memory: Tensor, mask: Tensor | None, tokens: Tensor) -> dict[str, Tensor]:
        """Logits [B,L,V] and K/V by the names of the files."""
        feeds = {"input_ids": tokens.numpy(), MEMORY: memory.numpy()}
        if self.facts.masks and mask is not None:
            feeds[MASK] = mask.numpy()
        if self._merged:
            feeds[BRANCH] = np.array([False])
            feeds |= {name: np.zeros((len(tokens), *shape[1:]), np.float32) for name, shape in self._past.items()}
        answers = self._decoder.run(feeds)
        return {name: torch.from_numpy(self._decoder.array(value)) for name, value in answers.items()}

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raise TxoptError("the files of an export are not traced")

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_masks: Sequence[Tensor | None],
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        raise TxoptError("the files of an export are not traced")

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        memory = self.memory(inputs)
        answers = self.decoded(memory, inputs.get("attention_mask"), tokens)
        own, cross = (_pairs(answers, kind) for kind in ("decoder", "encoder"))
        return Forward((memory,), answers["logits"].float(), own, cross)

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise TxoptError("an encoder-decoder has no outputs of an encoder alone")

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        asked = {**options, "return_dict_in_generate": True, "output_scores": True, "use_cache": False}
        result: Any = GenerationMixin.generate(self.module, **inputs, **asked)
        return Generated(result.sequences, getattr(result, "sequences_scores", None))


class _Encoder(nn.Module):
    """What transformers' generate() calls first."""

    def __init__(self, files: Originals, main_input: str) -> None:
        super().__init__()
        self._files, self.main_input_name = files, main_input

    def forward(self, **kwargs: Any) -> BaseModelOutput:  # generate() passes the mask on to what takes "kwargs"
        known = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
        return BaseModelOutput(last_hidden_state=self._files.memory(known))


class _Model(PreTrainedModel, GenerationMixin):
    """The files as a model of transformers: no weights, a whole-sequence forward, and generate() on top of it."""

    config_class = PreTrainedConfig
    base_model_prefix = "files"

    def __init__(self, config: PreTrainedConfig, files: Originals) -> None:
        super().__init__(config)
        self._files = files
        # The device and dtype of a model are those of its first parameter.
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    def main_input_name(self) -> str:
        return str(self._files.facts.inputs[0].name)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return _Encoder(self._files, self.main_input_name)

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Any = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,  # for the encoder; generate() takes no name that is not here
        **_: Any,
    ) -> Seq2SeqLMOutput:
        answers = self._files.decoded(encoder_outputs[0], attention_mask, decoder_input_ids)
        return Seq2SeqLMOutput(logits=answers["logits"])


def _opened(path: Any) -> Runner:
    try:
        return Runner(path)
    except TxoptError as err:
        raise SourceError(f"{path}: expected a graph that ONNX Runtime opens, found: {err}") from err


def _pairs(answers: Mapping[str, Tensor], kind: str) -> list[KV]:
    """K, V of every layer where the file gives them: an export without past does not."""
    found, layer = [], 0
    while f"present.{layer}.{kind}.key" in answers:
        found.append((answers[f"present.{layer}.{kind}.key"], answers[f"present.{layer}.{kind}.value"]))
        layer += 1
    return found
