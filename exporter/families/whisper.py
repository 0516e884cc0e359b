"""Whisper: log-mel features in, a source of fixed length that is never padded."""

from txopt.exporter.families.family import Family
from txopt.exporter.source import Input

WHISPER = Family(
    name="whisper",
    model_types=("whisper",),
    task="speech-to-text",
    inputs=(Input(name="input_features", dtype="float", axes=("B", "num_mel_bins", "2*max_source_positions")),),
    limit="max_target_positions",
    position_argument="decoder_position_ids",
)
