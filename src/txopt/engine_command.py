"""``txopt engine``: its options, and what it prints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from txopt.options import ArtifactPath, Json, Quiet, Verbose


def engine(
    artifact: ArtifactPath,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="a new artifact; where not given, ARTIFACT gets the engines")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="tensorrt-rtx, which needs no GPU to build; or tensorrt")
    ] = "tensorrt-rtx",
    capability: Annotated[
        str | None, typer.Option(help="GPUs to build for, such as SM89 or SM89,SM120; with tensorrt the one at hand")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="most sources at once; 8 where not given")] = None,
    max_beams: Annotated[int | None, typer.Option(help="most beams of a source; 4 where not given")] = None,
    max_source: Annotated[
        int | None, typer.Option(help="most tokens or frames of a source; the model's where not given")
    ] = None,
    max_prompt: Annotated[int | None, typer.Option(help="most tokens of a prompt; 64 where not given")] = None,
    cache_length: Annotated[
        int | None, typer.Option(help="most tokens of prompt and answer; the model's, up to 512, where not given")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="keep plans and kernel timings here, and take what is there")
    ] = None,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="tensorrt: plans that later versions load")
    ] = False,
    any_hardware: Annotated[
        bool, typer.Option("--any-hardware", help="tensorrt: plans for Ampere and all later GPUs, at some speed")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="weights may stay in the host's memory")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="tensorrt: weights can be replaced in a plan")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be built, and build nothing")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an artifact that is at OUT")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build TensorRT engines for an artifact; tensorrt-rtx does it on a machine without a GPU."""
    from txopt.cli import console_for
    from txopt.summary import of_engines, of_planned
    from txopt.surroundings import needs_exporter

    console: Any = console_for(quiet, verbose, as_json)
    with needs_exporter():
        from txopt.exporter import engines
        from txopt.exporter.engine import Switches
    switches = Switches(
        any_version=any_version, any_hardware=any_hardware, weight_streaming=weight_streaming, refit=refit
    )
    options = engines.Options(
        runtime=runtime,
        capabilities=tuple(name.strip().upper() for name in (capability or "").split(",") if name.strip()),
        batch=max_batch,
        beams=max_beams,
        source=max_source,
        prompt=max_prompt,
        cache=cache_length,
        switches=switches,
        kept=timing_cache,
    )
    if dry_run:
        document = engines.plan(artifact, options, out, overwrite=overwrite)
        console.result(document, of_planned(document))
        return
    with console.stages(engines.STAGES) as progress:
        made = engines.build(artifact, out, options, overwrite=overwrite, progress=progress)
    document = {"path": str(made.artifact.path), **made.engines.to_json(), "builds": dict(made.builds)}
    console.result(document, of_engines(document))
