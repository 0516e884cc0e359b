"""Decoders of public libraries, full-sequence code as it is published: each gets a cache, and says what it said without one."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.test_incremental import check_greedy
from tests.thirdparty.models import LAYERS, Eole, JoeyNMT, Wrapper, XTransformers, seeded
from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model

PACKAGES = {XTransformers: "x_transformers", JoeyNMT: "joeynmt", Eole: "eole"}

pytestmark = [pytest.mark.thirdparty, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs, at import


def made(kind: type[Wrapper], options: dict[str, Any]) -> Wrapper:
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        pytest.skip(f"{PACKAGES[kind]} is not installed: pip install --no-deps -r tests/thirdparty/requirements.txt")
    return seeded(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(XTransformers, {}, id="x-transformers"),
        pytest.param(XTransformers, {"dec_attn_flash": True, "dec_attn_kv_heads": 2}, id="x-transformers-flash"),
        pytest.param(
            XTransformers,
            {"dec_rotary_pos_emb": True, "dec_use_rmsnorm": True, "dec_ff_glu": True, "tie_token_emb": True},
            id="x-transformers-rotary",
        ),
        pytest.param(JoeyNMT, {"layer_norm": "pre"}, id="joeynmt"),
        pytest.param(Eole, {}, id="eole"),
    ],
)
def test_a_published_decoder_gets_a_cache(kind: type[Wrapper], options: dict[str, Any], tmp_path: Path) -> None:
    module = made(kind, options)
    artifact = export(module, tmp_path / "out")
    assert artifact.manifest.parity["passed"]
    nodes = artifact.manifest.fusion["decoder"]["nodes"]
    assert nodes["TensorScatter"] == nodes["Attention"] == 2 * LAYERS
    assert "Softmax" not in nodes
    check_greedy(module, Model(artifact))


def test_a_library_that_turns_sizes_into_numbers_is_told_which(tmp_path: Path) -> None:
    """x-transformers' ALiBi calls einx, which takes int() of every size."""
    with pytest.raises(SourceError, match="fixes the target length to 5"):
        export(made(XTransformers, {"dec_alibi_pos_bias": True}), tmp_path / "out")
