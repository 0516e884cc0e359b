"""The command line: options in, exit codes out. Every command's work lives in the library and is imported when it runs.

Exit codes: 0 done, 1 a defect of txopt, 2 wrong usage or input, 3 refused by a gate, 4 an optional package is missing; 130 and 143
after Ctrl-C and SIGTERM.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from txopt import __version__
from txopt.engine_command import engine
from txopt.options import (
    ArtifactPath,
    Calibration,
    Device,
    Json,
    MaxLoss,
    Method,
    Metric,
    Prove,
    Quiet,
    ReportFile,
    Scheme,
    Threads,
    Verbose,
)
from txopt.runtime.errors import TxoptError, UsageError
from txopt.surroundings import needs_exporter, without_network_noise

app = typer.Typer(
    name="txopt",
    help="Trained Transformer encoder-decoders to small, fast, verified artifacts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED, _TERMINATED = 130, 143  # 128 and the signal's number, as shells have it


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(help="a checkpoint's directory, a hub id, package.module:factory, or a folder Optimum exported"),
    ],
    out: Annotated[Path, typer.Argument(help="the directory to make")],
    target: Annotated[str, typer.Option(help="cpu, cuda or tensorrt; integers and fp8: see quantize")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8, int4 or fp8")] = "fp32",
    calibration: Calibration = None,
    max_loss: MaxLoss = None,
    metric: Metric = None,
    scheme: Scheme = None,
    method: Method = None,
    report: ReportFile = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that came with the checkpoint")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an artifact that is at OUT")] = False,
    prove: Prove = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Trace, fuse and verify a model into an artifact."""
    console = console_for(quiet, verbose, as_json)
    without_network_noise()
    with needs_exporter():
        from txopt.exporter import huggingface, pipeline  # noqa: F401 - it brings transformers
    with console.stages(pipeline.stages(precision, calibrated=calibration is not None)) as progress:
        artifact = pipeline.export(
            source,
            out,
            target=target,
            precision=precision,
            calibration=calibration,
            max_loss=max_loss,
            metric=metric,
            scheme=scheme,
            method=method,
            report=report,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            prove=prove,
            progress=progress,
        )
    from txopt.summary import of_artifact

    console.result(*_with_page(of_artifact(artifact, shown=str(out)), report))


@app.command()
def quantize(
    artifact: ArtifactPath,
    out: Annotated[Path, typer.Argument(help="the directory to make")],
    precision: Annotated[str, typer.Option(help="int8, int4, fp8, fp16 or bf16")] = "int8",
    target: Annotated[
        str, typer.Option(help="cpu; with --scheme weights or static also tensorrt, in fp16 also cuda")
    ] = "cpu",
    calibration: Calibration = None,
    max_loss: MaxLoss = None,
    metric: Metric = None,
    scheme: Scheme = None,
    method: Method = None,
    block: Annotated[
        int | None, typer.Option(help="rows of a weight that share a scale: 16, 32, 64, 128 or 256")
    ] = None,
    limit: Annotated[int, typer.Option(help="most samples to calibrate and measure on")] = 256,
    ranges: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="static: take ranges of activations from here, or keep them here if it is not there"
        ),
    ] = None,
    report: ReportFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an artifact that is at OUT")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Round an fp32 artifact to integers or half precision, and measure what that costs; needs no PyTorch."""
    console = console_for(quiet, verbose, as_json)
    with needs_exporter():
        from txopt.exporter import quantize as road
    with console.stages(road.STAGES) as progress:
        made = road.quantize(
            artifact,
            out,
            precision=precision,
            target=target,
            calibration=calibration,
            max_loss=max_loss,
            metric=metric,
            scheme=scheme or "weights",
            method=method,
            block=block,
            limit=limit,
            ranges=ranges,
            report=report,
            overwrite=overwrite,
            progress=progress,
        )
    from txopt.summary import of_artifact

    console.result(*_with_page(of_artifact(made, shown=str(out)), report))


app.command()(engine)


@app.command()
def verify(
    artifact: ArtifactPath,
    against: Annotated[str | None, typer.Option(help="record fresh cases from this SOURCE (needs PyTorch)")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Replay an artifact's reference cases: does it still say what PyTorch said?"""
    console = console_for(quiet, verbose, as_json)
    from txopt.runtime.artifact import Artifact
    from txopt.runtime.parity import verify as replay
    from txopt.summary import of_parity

    if against is None:
        report = replay(artifact, device=device, threads=threads)
    else:
        without_network_noise()
        with needs_exporter():
            from txopt.exporter import huggingface  # noqa: F401 - it brings transformers
            from txopt.exporter.pipeline import record_and_replay
        report = record_and_replay(Artifact.open(artifact), against, device=device, threads=threads)
    console.result(report.to_json(), of_parity(report))


@app.command()
def run(
    artifact: ArtifactPath,
    text: Annotated[
        str | None, typer.Option(help='a text, or "-" for one per line of stdin; a blank line gives a blank line')
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="a WAV or FLAC file")] = None,
    image: Annotated[Path | None, typer.Option(help="an image file")] = None,
    ids: Annotated[Path | None, typer.Option(help="an .npz of the encoder's inputs")] = None,
    num_beams: Annotated[int | None, typer.Option(help="beams; 1 is greedy")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="most tokens to generate")] = None,
    temperature: Annotated[float | None, typer.Option(help="sample at this temperature")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample among the k most likely")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample among the most likely of this total probability")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of sampling")] = None,
    language: Annotated[str | None, typer.Option(help="of the speech, where the model knows several")] = None,
    task: Annotated[str | None, typer.Option(help="transcribe or translate")] = None,
    source_language: Annotated[str | None, typer.Option(help="code of the text's language")] = None,
    target_language: Annotated[str | None, typer.Option(help="code of the language to write")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="print the text as it is generated")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run an artifact on text, speech, an image, or arrays."""
    console = console_for(quiet, verbose, as_json)
    from txopt.runtime.running import Request
    from txopt.runtime.running import run as run_request

    sampling = any(value is not None for value in (temperature, top_k, top_p, seed))
    options: dict[str, Any] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "do_sample": True if sampling else None,
        "language": language,
        "task": task,
        "source_language": source_language,
        "target_language": target_language,
    }
    request = Request(
        text=text, audio=audio, image=image, ids=ids, options={k: v for k, v in options.items() if v is not None}
    )
    if stream and as_json:
        raise UsageError("--stream prints pieces and --json one document: choose one")
    results = run_request(artifact, request, device=device, threads=threads, pieces=_print_piece if stream else None)
    if as_json and text == "-":
        console.result([document for document, _ in results], "")
        return
    for document, line in results:
        console.result(document, line)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="an artifact's directory, any .onnx file, or a .json file of ranges")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a page to look at: the graph by layers")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a page that is at FILE")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what is in an artifact or a .onnx file: sizes, operators, what was (or would be) fused, what not and why."""
    console = console_for(quiet, verbose, as_json)
    from txopt.inspection import inspect as look

    console.result(*look(path, html=html, overwrite=overwrite))


@app.command()
def optimize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="a .onnx file from any exporter, opset 11 to 24")],
    out: Annotated[Path, typer.Argument(help="the directory to make: model.onnx and weights.data")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what optimize left at OUT before")] = False,
    prove: Prove = False,
    in_place_cache: Annotated[
        bool, typer.Option("--in-place-cache", help="pasts that grow become buffers of fixed length, updated in place")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fuse a foreign .onnx file, and prove that it still says the same."""
    console = console_for(quiet, verbose, as_json)
    from txopt.exporter import foreign
    from txopt.summary import of_optimized

    with console.stages(foreign.STAGES) as progress:
        report = foreign.optimize(
            source, out, overwrite=overwrite, prove=prove, in_place_cache=in_place_cache, progress=progress
        )
    document = report.to_json()
    console.result(document, of_optimized(document))


@app.command()
def bench(
    artifact: ArtifactPath,
    against: Annotated[str | None, typer.Option(help='a peer: "torch" (needs --source)')] = None,
    source: Annotated[str | None, typer.Option(help="the SOURCE the artifact came from, for peers")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; repeat the option")] = None,
    source_length: Annotated[int, typer.Option(help="source tokens")] = 64,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate, no fewer and no more")] = 64,
    repeats: Annotated[int, typer.Option(help="timed runs of each")] = 5,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency, throughput, load time, memory and size; against PyTorch where asked."""
    console = console_for(quiet, verbose, as_json)
    from txopt.benchmarks.harness import Settings, measure

    settings = Settings(
        batches=tuple(batch or (1, 8)),
        source_length=source_length,
        new_tokens=new_tokens,
        repeats=repeats,
        device=device,
        threads=threads,
    )
    console.result(*measure(artifact, settings, peer=against, source=source, note=console.note))


@app.command()
def demo(
    words: Annotated[list[str] | None, typer.Argument(help="words to pronounce")] = None,
    out: Annotated[Path, typer.Option(help="where the demo's artifact goes")] = Path("demo-out"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export the bundled g2p model, verify it, pronounce words, compare its speed with PyTorch's."""
    console = console_for(quiet, verbose, False)
    from txopt.demonstration import demonstrate

    demonstrate(words or ["transformer", "verified", "onomatopoeia", "txopt"], out, console)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(f"txopt {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs a command, turns errors into messages and exit codes; ``arguments`` None: the process's own."""
    from txopt.console import fail
    from txopt.runtime.termination import Terminated, terminable

    try:
        with terminable():
            app(arguments, standalone_mode=True)
    except TxoptError as err:
        sys.exit(fail(err))
    except BrokenPipeError:
        sys.exit(0)
    except OSError as err:  # what commands read and write raises errors of ours; this is the output itself
        print(f"error: the output cannot be written: {err.strerror or err}", file=sys.stderr)
        sys.exit(1)
    except Terminated:
        print("terminated; nothing was left half written", file=sys.stderr)
        sys.exit(_TERMINATED)
    except SystemExit as done:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # typer's, when nobody reads on; it ends with 1 then
            sys.exit(0)
        if done.code == _INTERRUPTED:  # typer makes it of Ctrl-C, and says nothing
            print("interrupted; nothing was left half written", file=sys.stderr)
        raise


def console_for(quiet: bool, verbose: bool, as_json: bool) -> Any:
    """The console of a command with these options; its messages go there."""
    from txopt.console import Console, set_up_logging

    set_up_logging(quiet=quiet, verbose=verbose)
    return Console(quiet=quiet, as_json=as_json)


def _with_page(result: tuple[dict[str, Any], str], page: Path | None) -> tuple[dict[str, Any], str]:
    document, text = result
    return result if page is None else ({**document, "report": str(page)}, f"{text}\n  report: {page}")


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    main()
