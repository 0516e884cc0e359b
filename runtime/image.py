"""Images in: files to pixel values, through Pillow, as the checkpoint's saved image processor does it.

Owns decoding, resize, center crop, rescale and normalisation, equal to transformers' PIL image processors to 1e-5.
Which of them happen, with which numbers, is data in the manifest's "frontend", under transformers' names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import ArtifactError, InputError, MissingDependencyError, explain
from txopt.runtime.frontend import STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource = Union[str, Path, BinaryIO, "Image"]


class ImageFrontend:
    """Images to pixel values.

    Keys of "frontend": do_resize with size ({"height", "width"} or {"shortest_edge"}) and resample (Pillow's number),
    do_center_crop with crop_size, do_rescale with rescale_factor, do_normalize with image_mean and image_std.
    """

    def __init__(self, frontend: Mapping[str, Any]) -> None:
        """Raises ArtifactError where a step is asked for and its numbers are missing or unknown."""
        problems = [
            f"{step} without {key}"
            for step, keys in STEPS.items()
            for key in keys
            if frontend.get(step) and frontend.get(key) is None
        ]
        size = frontend.get("size")
        if frontend.get("do_resize") and size and set(size) not in ({"height", "width"}, {"shortest_edge"}):
            problems.append(f"size: expected height and width or shortest_edge, found {size}")
        if problems:
            raise ArtifactError(explain("manifest.json: the image front end is damaged; export again:", problems))
        self._size: dict[str, int] | None = size if frontend.get("do_resize") else None
        self._resample = int(frontend.get("resample", 2))
        self._crop: dict[str, int] | None = frontend["crop_size"] if frontend.get("do_center_crop") else None
        self._factor: float | None = frontend["rescale_factor"] if frontend.get("do_rescale") else None
        self._norm: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        if frontend.get("do_normalize"):
            mean, std = (np.broadcast_to(np.asarray(frontend[key], np.float32), 3) for key in STEPS["do_normalize"])
            self._norm = mean[:, None, None], std[:, None, None]

    def encode(self, images: Sequence[ImageSource]) -> dict[str, NDArray[np.float32]]:
        """Feeds for the encoder.

        Args:
            images: B paths, open binary files or Pillow images, of any size and mode; they are turned as their EXIF
                orientation says and read as RGB.

        Returns:
            pixel_values, float32 [B,3,H,W].

        Raises:
            InputError: nothing of these, not a file, not an image, a damaged image, or images that differ in size after
                processing.
            MissingDependencyError: Pillow is not installed.
        """
        if len(images) == 0:
            raise InputError("expected at least one image, found none")
        rows = [self._pixels(_open(image)) for image in images]
        shapes = sorted({row.shape[1:] for row in rows})
        if len(shapes) > 1:
            raise InputError(f"expected images of one size, found (height, width) {shapes}; give them one by one")
        return {"pixel_values": np.stack(rows)}

    def _pixels(self, image: "Image") -> NDArray[np.float32]:
        if self._size is not None:
            image = image.resize(_target(image, self._size), resample=self._resample)
        pixels: NDArray[Any] = np.moveaxis(np.asarray(image), -1, 0)
        if self._crop is not None:
            pixels = _center_crop(pixels, self._crop["height"], self._crop["width"])
        if self._factor is not None:
            pixels = pixels.astype(np.float64) * self._factor
        values: NDArray[np.float32] = pixels.astype(np.float32)
        if self._norm is not None:
            mean, std = self._norm
            values = (values - mean) / std
        return np.ascontiguousarray(values)


def _target(image: "Image", size: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) to resize to."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short = size["shortest_edge"]
    long = int(short * max(image.size) / min(image.size))
    return (short, long) if image.width <= image.height else (long, short)


def _center_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """[3,height,width] out of the middle of [3,H,W]; a smaller image is padded with zeros, the odd one before it."""
    short = [max(0, wanted - found) for wanted, found in zip((height, width), pixels.shape[1:], strict=True)]
    if any(short):
        pixels = np.pad(pixels, [(0, 0), *((-(-missing // 2), missing // 2) for missing in short)])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _open(source: ImageSource) -> "Image":
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as err:
        raise MissingDependencyError('reading images needs Pillow: pip install "txopt[image]"') from err
    if not isinstance(source, (str, Path, Image.Image)) and not hasattr(source, "read"):
        raise InputError(
            f"expected a path, an open binary file or a Pillow image, found {type(source).__name__}; "
            "make an array an image with PIL.Image.fromarray"
        )
    name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", None) or "image")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise InputError(
            f"{name}: expected an image file, found {'a folder' if Path(source).is_dir() else 'no such file'}"
        )
    try:
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source).convert("RGB")
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as err:
        raise InputError(f"{name}: expected an image (PNG, JPEG, ...), found something else") from err
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise InputError(f"{name}: expected a whole image, found a damaged or oversized one: {err}") from err
