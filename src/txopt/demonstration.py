"""``txopt demo``: the whole road on the bundled g2p model, in under a minute: export, verify, pronounce, compare.

It owns what is shown and nothing else: every step is the public one.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from txopt.console import Console
from txopt.runtime.errors import MissingDependencyError

SOURCE = "txopt.examples.g2p.model:factory"


def demonstrate(words: Sequence[str], out: Path, console: Console) -> None:
    """Exports to ``out`` (an earlier demo there is replaced), pronounces ``words``, prints what happened."""
    try:
        import torch

        from txopt.exporter import huggingface, pipeline  # noqa: F401 - the former brings transformers
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            f'the demo exports a model and needs {err.name}: pip install "txopt[export]"'
        ) from err
    from txopt.benchmarks.peers import TorchEager, Txopt
    from txopt.benchmarks.timing import in_turn, ratio
    from txopt.runtime.model import load
    from txopt.runtime.parity import verify
    from txopt.summary import of_artifact, of_parity

    start = time.perf_counter()
    print(f"1. txopt export {SOURCE} {out}")
    with console.stages(pipeline.STAGES) as progress:
        artifact = pipeline.export(SOURCE, out, overwrite=True, progress=progress)
    print(of_artifact(artifact)[1])
    print(f"\n2. txopt verify {out}")
    print(of_parity(verify(out)))
    print(f"\n3. txopt run {out} --text WORD")
    model = load(out)
    pronounce = model.pipeline("text")
    width = max(map(len, words))
    for word, phonemes in zip(words, pronounce([word.lower() for word in words]), strict=True):
        print(f"   {word:{width}}  {phonemes}")
    print("\n4. the same words in PyTorch")
    feeds, _ = pronounce.prepare([word.lower() for word in words])
    peers = {"txopt": Txopt(model), "torch": TorchEager(SOURCE, "fp32", None)}
    tokens = 16
    calls = {name: lambda peer=peer: peer.generate(feeds, tokens) for name, peer in peers.items()}
    times = in_turn(calls, repeats=5)
    faster = ratio(times["txopt"], times["torch"])["median"]
    print(
        f"   txopt {times['txopt'].median * 1e3:.1f} ms, PyTorch {torch.__version__} eager {times['torch'].median * 1e3:.1f} ms "
        f"({faster:.1f}x; the module has no cache, so PyTorch computes every step anew)"
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"\n{size / 1e6:.1f} MB in {out}, {time.perf_counter() - start:.0f} s in all")
