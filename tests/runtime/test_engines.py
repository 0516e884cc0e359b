"""What engines.json may say, and what is refused before any engine is loaded."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime.artifacts import Document, fill, manifest, put, tensor
from txopt.runtime.artifact import Artifact
from txopt.runtime.engines import FILE, EngineSet, Plan, Profile, engines_of, to_bytes
from txopt.runtime.errors import ArtifactError
from txopt.runtime.writer import ArtifactWriter


def engine_set() -> EngineSet:
    graphs = manifest().graphs
    encoder = Plan(
        file="engines/encoder.plan",
        inputs=graphs["encoder"].inputs,
        outputs=graphs["encoder"].outputs,
        profiles=(Profile(name="encode", axes={"B": (1, 1, 8), "T": (1, 64, 512)}),),
    )

    def fixed(items: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(tensor(t.name, t.dtype, *(64 if a == "S" else a for a in t.axes)) for t in items)  # type: ignore[attr-defined]

    ranges = {"B": (1, 1, 8), "R": (1, 4, 32), "T": (1, 64, 512)}
    decoder = Plan(
        file="engines/decoder.plan",
        inputs=fixed(graphs["decoder"].inputs),  # type: ignore[arg-type]
        outputs=fixed(graphs["decoder"].outputs),  # type: ignore[arg-type]
        profiles=(
            Profile(name="step", axes={**ranges, "Q": (1, 1, 1)}),
            Profile(name="prefill", axes={**ranges, "Q": (1, 4, 63)}),
        ),
    )
    return EngineSet(
        runtime="tensorrt-rtx",
        version="1.7.1.1",
        any_version=False,
        capabilities=("SM89",),
        any_hardware=False,
        precision="fp32",
        cache_length=64,
        plans={"encoder": encoder, "decoder": decoder},
    )


def write(out: Path, change: Callable[[Document], None] = lambda document: None) -> Artifact:
    document = json.loads(to_bytes((engine_set(),)))
    change(document)
    with ArtifactWriter(out) as writer:
        fill(writer.directory)
        for name in ("encoder", "decoder"):
            (writer.directory / f"engines/{name}.plan").write_bytes(b"plan")
        (writer.directory / FILE).write_text(json.dumps(document))
        return writer.commit(manifest())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert engines_of(write(tmp_path / "out")) == (engine_set(),)


def test_an_artifact_without_the_file_has_no_engines(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.directory)
        artifact = writer.commit(manifest())
    assert engines_of(artifact) == ()


def test_a_changed_plan_is_refused_before_anything_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out/engines/decoder.plan").write_bytes(b"evil")
    with pytest.raises(ArtifactError, match=r"decoder\.plan.*SHA-256"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", 2, "expected format 1, found 2"),
        ("format", True, "expected format 1, found True"),
        ("format", 1.0, r"expected format 1, found 1\.0"),
        ("sets/0/runtime", "cuda", "runtime"),
        ("sets/0/version", "1.7\x1b[2J", r"version: expected .* such as 1\.7\.1, found '1\.7\\x1b\[2J'"),
        ("sets/0/any_version", 1, "any_version"),
        ("sets/0/capabilities", [], "capabilities: expected names such as SM89, found none"),
        ("sets/0/capabilities", ["SM89", "bogus"], r"capabilities: expected names such as SM89, found 'bogus'$"),
        ("sets/0/capabilities", ["SM89\n"], r"capabilities: .*found 'SM89\\n'$"),
        ("sets/0/capabilities", ["SM\u0668\u0669"], r"capabilities: .*found 'SM\\u0668\\u0669'$"),
        ("sets/0/capabilities", ["\x1b[2JSM89", 89, None], r"capabilities: .*found '\\x1b\[2JSM89', 89, None$"),
        ("sets/0/precision", "fp16", r"sets\[0\]\.precision: expected fp32, as the manifest says, found 'fp16'"),
        ("sets/0/cache_length", None, r"sets\[0\]\.cache_length: expected a number of places, found None"),
        ("sets/0/plans", {}, "plans"),
        ("sets/0/plans/decoder/file", "engines/other.plan", "among the manifest's files"),
        ("sets/0/plans/decoder/file", "weights.data", r"expected a \.plan"),
        ("sets/0/plans/decoder/file", "engines/encoder.plan", "different files, found 'engines/encoder.plan' twice"),
        (
            "sets/0/plans/encoder/inputs/1/name",
            "input_ids",
            r"encoder\.inputs: expected different names, found 'input_ids' twice",
        ),
        ("sets/0/plans/decoder/inputs/3/axes/2", "S", r"decoder: expected the length of the cache in the place of S"),
        ("sets/0/plans/decoder/profiles", [], "at least one"),
        ("sets/0/plans/decoder/profiles/0/axes/R", [4, 1, 8], "a least, a usual and a largest"),
        ("sets/0/plans/decoder/profiles/0/axes", {"R": [1, 1, 1]}, "expected ranges of B Q R T, found R"),
        (
            "sets/0/plans/decoder/profiles/0/name",
            "st\x1b[2Jep",
            r"profiles\[0\]\.name: expected .*, found 'st\\x1b\[2Jep'",
        ),
        ("sets/0/extra", 1, "unknown key"),
    ],
)
def test_what_breaks_a_rule_is_refused(where: str, value: object, message: str, tmp_path: Path) -> None:
    artifact = write(tmp_path / "out", put(where, value))
    with pytest.raises(ArtifactError, match=message):
        engines_of(artifact)


def test_two_sets_do_not_share_a_plan(tmp_path: Path) -> None:
    def again(document: Document) -> None:
        document["sets"].append({**document["sets"][0], "capabilities": ["SM120"]})

    with pytest.raises(ArtifactError, match=r"different files, found 'engines/encoder\.plan' twice"):
        engines_of(write(tmp_path / "out", again))


@pytest.mark.parametrize("cache_length", [64, None])
def test_an_encoder_alone_has_no_cache(cache_length: int | None, tmp_path: Path) -> None:
    both, whole = manifest(), engine_set()
    encoder = replace(both.graphs["encoder"], outputs=both.graphs["encoder"].outputs[:1])
    plan = replace(whole.plans["encoder"], outputs=encoder.outputs)
    one = replace(whole, cache_length=cache_length, plans={"encoder": plan})
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.directory)
        (writer.directory / plan.file).write_bytes(b"plan")
        (writer.directory / FILE).write_bytes(to_bytes((one,)))
        artifact = writer.commit(replace(both, kind="encoder", graphs={"encoder": encoder}, cache=None))
    if cache_length is None:
        assert engines_of(artifact) == (one,)
    else:
        with pytest.raises(
            ArtifactError, match=r"sets\[0\]\.cache_length: expected null, for there is no decoder, found 64"
        ):
            engines_of(artifact)


def test_all_that_is_wrong_is_told_at_once_and_nothing_steers_a_terminal(tmp_path: Path) -> None:
    def change(document: Document) -> None:
        (one,) = document["sets"]
        one |= {"precision": "int4", "cache_length": None, "\x1b[31m": 1}
        one["plans"]["\x1b[2J"] = {}

    with pytest.raises(ArtifactError) as caught:
        engines_of(write(tmp_path / "out", change))
    assert {"precision", "cache_length", "unknown key", "plans"} <= set(
        re.findall(r"[a-z_]+ key|[a-z_]+", str(caught.value))
    )
    assert "\x1b" not in str(caught.value)


def test_a_profile_takes_what_lies_in_its_ranges() -> None:
    profile = engine_set().plans["decoder"].profiles[1]
    assert profile.takes({"Q": 63, "R": 1})
    assert not profile.takes({"Q": 64, "R": 1})
