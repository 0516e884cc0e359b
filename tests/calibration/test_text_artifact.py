"""A whole artifact of T5's, with its tokenizer: from lines of a file to the decoder's answers, batch by batch."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_tokenizers as tiny
from tests.calibration.models import decoder_ids
from tests.exporter.models import checkpoint
from txopt.calibration.batches import batches
from txopt.calibration.data import read
from txopt.exporter.pipeline import export
from txopt.runtime.model import Model

logging.getLogger("torch.__trace").propagate = False  # megabytes; see tests/conftest.py


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("t5")
    source = checkpoint("t5", directory)
    config = (source / "config.json").read_bytes()
    tiny.t5(source)
    (source / "config.json").write_bytes(config)
    return Model(export(source, directory / "artifact"))


def test_every_sample_is_answered_in_a_batch_as_it_is_alone(t5: Model, tmp_path: Path) -> None:
    lines = [f'{{"source": "{text}", "target": "{text[:20]}"}}' for text in tiny.ENGLISH[:5]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    samples = read(tmp_path / "pairs.jsonl", t5)
    assert samples.counts.references == 5
    seen = 0
    for batch in batches(samples, 3):
        together = t5.decode(t5.encode(**batch.feeds)).feed(decoder_ids(batch))
        for row, index in enumerate(batch.indices):
            sample = samples[index]
            assert sample.labels is not None
            fed = np.concatenate([sample.prompt, sample.labels[:-1]])[None]
            alone = t5.decode(t5.encode(**sample.feeds)).feed(fed)
            assert alone.shape[1] == batch.lengths[row] == len(sample.labels)
            np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=1e-4)
            seen += 1
    assert seen == 5


def test_without_data_the_loop_runs_all_the_same(t5: Model) -> None:
    samples = read(None, t5, limit=6)
    for batch in batches(samples, 3):
        result = t5.generate(**batch.feeds, decoder_input_ids=batch.prompt, max_new_tokens=4, **samples.options)
        assert len(result.sequences) == len(batch.indices)
