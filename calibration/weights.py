"""The one entry that quantizes a weight: a scheme, a method, and what calibration knows of the weight's inputs."""

from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.clipping import clip
from txopt.calibration.gptq import gptq
from txopt.calibration.hqq import hqq
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.errors import UsageError


class Method(StrEnum):
    """How codes are found. AWQ is CLIP on a weight that its scales (awq.py) were folded into."""

    RTN = "rtn"  # round to nearest
    HQQ = "hqq"  # grids fitted to the weight
    CLIP = "clip"  # the range searched, by the weight alone or by what its inputs make of the error
    GPTQ = "gptq"  # errors made up for by the rows behind; needs moments


def quantize(
    weight: NDArray[Any],
    scheme: BlockScheme,
    method: Method = Method.RTN,
    *,
    moments: NDArray[Any] | None = None,
    name: str = "",
) -> Blocks:
    """``weight`` [K,N] of any float type in blocks along K.

    ``moments`` [K,K] are the second moments of its inputs (moments.py): GPTQ needs them, CLIP uses them, RTN and HQQ do not look at
    them. ``name`` is for messages. SourceError where the weight is no finite matrix, InputError where the moments do not belong to it,
    UsageError where they are missing.
    """
    match method:
        case Method.RTN:
            return round_to_nearest(weight, scheme, name=name)
        case Method.HQQ:
            return hqq(weight, scheme, name=name)
        case Method.CLIP:
            return clip(weight, scheme, name=name, moments=moments)
        case Method.GPTQ:
            if moments is None:
                raise UsageError(
                    f"weight {name}: GPTQ needs calibration data, got none; give some, or use rtn, hqq or clip"
                )
            return gptq(weight, moments, scheme, name=name)
