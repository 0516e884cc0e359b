"""Arguments and options that several commands share: their types, and what --help says of them."""

from pathlib import Path
from typing import Annotated

import typer

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="an artifact's directory")]
Json = Annotated[bool, typer.Option("--json", help="exactly one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, no warnings")]
Prove = Annotated[bool, typer.Option("--prove", help="replay every fusion alone; leave out what does not hold")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="say more")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=".txt .csv .jsonl texts, .tsv of files and texts, .npz arrays; not for fp32"),
]
MaxLoss = Annotated[float | None, typer.Option(help="refuse what loses more points of the metric; not for fp32")]
Metric = Annotated[str | None, typer.Option(help="what the loss is measured in; chosen by the task where not given")]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="weights (in blocks); of int8 also rows, mixed (rows in the encoder); of int8 and fp8 static (scales found on data)"
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="of weights: rtn, hqq, clip, awq, gptq or descent; with static, of ranges: absmax, percentile, entropy or mse"
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="write a page about what was lost and why, also of a refusal"),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda-graphs or tensorrt; the GPU N by :N behind the latter three")
]
Threads = Annotated[int | None, typer.Option(help="engine threads; one per core where not given")]
