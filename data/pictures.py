"""Pictures from untrusted files: opened whole, upright and as RGB, or refused with a reason.

Only `FORMATS` are read, recognised by content, not by name (Pillow would hand an .eps to
Ghostscript). Transparency becomes white, the first frame of an animation counts, and more than 8
bits of grey are scaled to 8, not clipped.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from training.console import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485  # a quarter of a GB as RGB; Pillow warns above it and goes on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused here instead
TURNS = {  # EXIF's orientation: the turn that sets a picture upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class ImageFiles(Sequence):
    """Images on the disk, each opened when it is used and closed again."""

    def __init__(self, paths: list[Path]):
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return open_image(self.paths[index])
        except IndexError:
            raise
        except Exception as error:  # it was whole when it was checked
            raise UserError(
                f"cannot read the image {self.paths[index]} any more: {error}"
            ) from None


def open_image(path: Path) -> Image.Image:
    """The whole picture, RGB, upright. Raises almost anything for a file that is not a picture."""
    try:
        file = Image.open(path, "r", FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"by its content none of {', '.join(FORMATS)}") from None
    with file:
        if not 0 < file.width * file.height <= MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels")
        file.load()
        picture = upright(file)
        if picture.mode == "F" or picture.mode.startswith("I"):
            picture = eight_bits(picture)
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return page.convert("RGB")


def upright(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says, which viewers do and Pillow leaves to the caller (but for TIFF)."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF says nothing; the picture itself may be whole
        return picture
    return picture if turn is None else picture.transpose(turn)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as 8 bits, where `convert` would clip all above 255.

    White is the mode's (65535), or the first of 1, 255 and 65535 that no pixel exceeds; other
    values are stretched.
    """
    values = np.asarray(picture).astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(picture.mode, (65535,))
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        values, white = values - low, max(high - low, 1e-30)
    return Image.fromarray((values / white * 255).round().astype(np.uint8))


def look_into(path: Path) -> tuple[str | None, list[int] | None]:
    """Why an image cannot be used, None if it can; and its width and height, None if it cannot."""
    try:
        picture = open_image(path)
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return str(error) or type(error).__name__, None
    if max(picture.size) > 200 * min(picture.size):  # Qwen2-VL's processor would raise
        return f"{picture.width} x {picture.height} pixels is too long a strip", None
    return None, list(picture.size)
