"""The one entry that quantizes a weight: a scheme, a method, and what calibration knows of the weight's inputs."""

from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.clipping import clip
from txopt.calibration.descent import descended
from txopt.calibration.gptq import gptq
from txopt.calibration.hqq import hqq
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.errors import UsageError


class Method(StrEnum):
    """How codes are found."""

    RTN = "rtn"  # round to nearest
    HQQ = "hqq"  # grids fitted to the weight
    CLIP = "clip"  # the range searched, by the weight alone or by what its inputs make of the error
    AWQ = "awq"  # CLIP on a weight that its inputs' scales (awq.py) were folded into
    GPTQ = "gptq"  # errors made up for by the rows behind; needs moments
    DESCENT = "descent"  # what GPTQ gives, improved number by number; needs moments


LOOK_AT_DATA = (Method.CLIP, Method.AWQ, Method.GPTQ, Method.DESCENT)


def quantize(
    weight: NDArray[Any],
    scheme: BlockScheme,
    method: Method = Method.RTN,
    *,
    moments: NDArray[Any] | None = None,
    name: str = "",
) -> Blocks:
    """``weight`` [K,N] of any float type in blocks along K.

    ``moments`` [K,K] are the second moments of its inputs (moments.py): GPTQ and DESCENT need them, CLIP and AWQ use them, RTN and
    HQQ do not look at them. ``name`` is for messages. SourceError where the weight is no finite matrix, InputError where the
    moments do not belong to it, UsageError where they are missing.
    """
    match method:
        case Method.RTN:
            return round_to_nearest(weight, scheme, name=name)
        case Method.HQQ:
            return hqq(weight, scheme, name=name)
        case Method.CLIP | Method.AWQ:
            return clip(weight, scheme, name=name, moments=moments)
        case Method.GPTQ | Method.DESCENT:
            if moments is None:
                raise UsageError(
                    f"weight {name}: {method} needs calibration data, got none; give some, or use rtn, hqq or clip"
                )
            return (gptq if method is Method.GPTQ else descended)(weight, moments, scheme, name=name)
