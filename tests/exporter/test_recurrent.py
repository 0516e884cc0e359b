"""Recurrent layers are named, with what to do: no cache keeps their state, and no trace serves two lengths of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.exporter.cacheless import WIDTH, Learned
from tests.exporter.test_custom import Tiny
from tests.exporter.test_own_code import refused
from txopt.exporter.custom import DecodeCache
from txopt.exporter.custom_source import open_module


class Layers(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.gru(x)[0])[0])


class Cell(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def logits(self, x: Tensor) -> Tensor:
        states = [torch.zeros(x.shape[0], WIDTH)]
        for place in range(x.shape[1]):
            states.append(self.cell(x[:, place], states[-1]))
        return self.head(torch.stack(states[1:], 1))


class Cached(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 16, batch_first=True)

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        logits: Tensor = super().decode(tokens, memory, cache)
        return logits + self.head(self.gru(self.embed(tokens))[0])


@pytest.mark.parametrize(
    ("kind", "named"), [(Layers, "gru (GRU), lstm (LSTM)"), (Cell, "cell (GRUCell)"), (Cached, "gru (GRU)")]
)
def test_those_of_a_decoder_are_named_and_attention_is_advised(kind: type[nn.Module], named: str) -> None:
    said = refused(kind())
    assert f"decode() runs recurrent layers: {named}; expected a Transformer decoder" in said
    assert "Put self-attention in their place" in said


class Encoder(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.rnn(super().encode(input_ids, attention_mask))[0]


class Packed(Encoder):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = self.tokens(input_ids), attention_mask.sum(1)
        packed = pack_padded_sequence(*given, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=input_ids.shape[1])[0]


@pytest.mark.parametrize("kind", [Encoder, Packed])
def test_those_of_an_encoder_are_named_where_the_trace_fails(kind: type[nn.Module]) -> None:
    said = refused(kind())
    assert "encoder.onnx" in said
    assert "recurrent layers that are run (rnn (LSTM)) do that" in said
    assert "control flow" not in said
    assert "int()" not in said


class Unused(Learned):
    """Of the training, say."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.GRU(WIDTH, WIDTH)


def test_one_that_decode_does_not_run_is_no_obstacle() -> None:
    assert open_module(Unused()).facts.kind == "encoder-decoder"
