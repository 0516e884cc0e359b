"""Images to pixel values as transformers' PIL processors compute them, and every image that is refused."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from txopt.runtime.errors import ArtifactError, InputError, MissingDependencyError
from txopt.runtime.image import ImageFrontend

STEPS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize")
SHAPES = [(48, 64), (64, 48), (37, 53), (300, 200), (20, 20), (1, 7)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def frontend(processor: Any) -> dict[str, Any]:
    settings = processor.to_dict()
    return {key: settings.get(key) for key in (*STEPS, "image_mean", "image_std")}


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        ViTImageProcessorPil(size={"height": 24, "width": 40}, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=0.5),
        ViTImageProcessorPil(do_normalize=False, size={"height": 32, "width": 32}),
        ViTImageProcessorPil(do_rescale=False, do_normalize=False, size={"height": 32, "width": 32}),
        DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
        DeiTImageProcessorPil(do_resize=False, crop_size={"height": 45, "width": 33}),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 15}, do_center_crop=False),
    ],
)
def test_pixels_are_transformers(processor: Any, height: int, width: int) -> None:
    image = picture(height, width)
    result = ImageFrontend(frontend(processor)).encode([image])["pixel_values"]
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


@pytest.fixture
def vit() -> ImageFrontend:
    return ImageFrontend(frontend(ViTImageProcessorPil(size={"height": 16, "width": 16})))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_any_mode_is_read_as_rgb(tmp_path: Path, vit: ImageFrontend, mode: str) -> None:
    path = tmp_path / "image.tiff"
    image = picture(20, 30).convert(mode)
    image.save(path)
    expected = vit.encode([image.convert("RGB")])["pixel_values"]
    np.testing.assert_array_equal(vit.encode([path])["pixel_values"], expected)


def test_paths_open_files_and_batches(tmp_path: Path, vit: ImageFrontend) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    picture(20, 30).save(first)
    picture(40, 30).save(second)
    both = vit.encode([str(first), io.BytesIO(second.read_bytes())])["pixel_values"]
    assert both.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(both[0], vit.encode([first])["pixel_values"][0])
    np.testing.assert_array_equal(both[1], vit.encode([second])["pixel_values"][0])


def test_exif_orientation_is_followed(tmp_path: Path, vit: ImageFrontend) -> None:
    image = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter to the right to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    expected = vit.encode([image.transpose(Image.Transpose.ROTATE_270)])["pixel_values"]
    np.testing.assert_array_equal(vit.encode([tmp_path / "turned.png"])["pixel_values"], expected)


def test_files_that_are_not_images(tmp_path: Path, vit: ImageFrontend) -> None:
    path = tmp_path / "image.png"
    with pytest.raises(InputError, match=r"image\.png: expected an image file, found no such file"):
        vit.encode([path])
    with pytest.raises(InputError, match="found a folder"):
        vit.encode([tmp_path])
    path.write_bytes(b"this is text")
    with pytest.raises(InputError, match=r"expected an image .* found something else"):
        vit.encode([path])
    path.write_bytes(b"")
    with pytest.raises(InputError, match="found something else"):
        vit.encode([path])


def test_damaged_images(tmp_path: Path, vit: ImageFrontend) -> None:
    path = tmp_path / "image.png"
    picture(60, 60).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or oversized"):
        vit.encode([path])
    data = whole.index(b"IDAT")
    path.write_bytes(whole[: data + 20] + b"\0" * 50 + whole[data + 70 :])
    with pytest.raises(InputError, match="damaged or oversized"):
        vit.encode([path])


def test_oversized_images(vit: ImageFrontend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(60, 60).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="damaged or oversized"):
        vit.encode([tmp_path / "large.png"])


def test_batches_that_do_not_fit(vit: ImageFrontend) -> None:
    with pytest.raises(InputError, match="at least one image"):
        vit.encode([])
    as_they_are = ImageFrontend({"do_rescale": True, "rescale_factor": 1 / 255})
    with pytest.raises(InputError, match="expected images of one size"):
        as_they_are.encode([picture(20, 30), picture(30, 20)])


def test_incomplete_manifests_list_all_that_is_missing() -> None:
    with pytest.raises(ArtifactError, match=r"(?s)do_center_crop without crop_size.*without image_std.*longest_edge"):
        ImageFrontend(
            {
                "do_resize": True,
                "size": {"longest_edge": 3},
                "do_center_crop": True,
                "do_normalize": True,
                "image_mean": 0,
            }
        )


def test_without_pillow_the_message_says_what_to_install(vit: ImageFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "txopt\[image\]"'):
        vit.encode(["image.png"])
