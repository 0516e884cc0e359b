"""Libraries that stand in for CUDA's, made of fake_cuda.c, so that ONNX Runtime's CUDA provider opens sessions without a GPU.

It takes a C compiler (``cc``) and binutils (``nm``, ``objdump``). What the provider asks of each library is read from the provider.
"""

import re
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.c")
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
KINDS = ("launches", "to_device", "to_host", "on_device", "recorded", "replayed")  # as fake_cuda.c counts
_LIBRARIES = {
    "cudart": r"(__)?cuda[A-Z]",
    "cublasLt": r"cublasLt",
    "cublas": r"cublas",
    "curand": r"curand",
    "cuda": r"cu[A-Z]",
}
_NEEDED = re.compile(r"NEEDED\s+(lib(cudart|cublasLt|cublas|curand|cuda)\.so\.\d+)")


def build(package: Path, folder: Path) -> None:
    """Writes the libraries into ``folder``; ``package`` is where the wheel of onnxruntime-gpu was unpacked.

    Raises:
        subprocess.CalledProcessError: a tool failed, and said why.
    """
    provider = str(package / PROVIDER)
    asked = {
        line.split()[-1].partition("@")[0] for line in _said("nm", "-D", "--undefined-only", provider).splitlines()
    }
    for file, name in _NEEDED.findall(_said("objdump", "-p", provider)):
        mine = sorted(symbol for symbol in asked if re.match(_LIBRARIES[name], symbol))
        asked -= set(mine)
        _library(folder, file, mine, SOURCE.read_text("utf-8") if name == "cudart" else "")


def _library(folder: Path, file: str, symbols: list[str], written: str) -> None:
    there = set(re.findall(r"^\w[\w ]*[ *]+(\w+)\(", written, re.MULTILINE))
    rest = "".join(_body(symbol) for symbol in symbols if symbol not in there)
    source, versions = folder / f"{file}.c", folder / f"{file}.map"
    source.write_text(f"#include <stdlib.h>\n{written}\n{rest}", "utf-8")
    versions.write_text(f"{file} {{ global: *; }};\n", "utf-8")
    options = ("-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{file}", f"-Wl,--version-script={versions}")
    _said("cc", *options, "-o", str(folder / file), str(source))


def _body(symbol: str) -> str:
    if re.match(r"cublas\w*Create", symbol):
        return f"int {symbol}(void **made) {{ *made = malloc(64); return 0; }}\n"
    return f"int {symbol}() {{ return 0; }}\n"


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
