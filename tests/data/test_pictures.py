"""Pictures of every kind are seen as they are meant; what cannot be used has a reason."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.pictures import FORMATS, ImageFiles, look_into, open_image
from training.console import UserError

ROOT = Path(__file__).resolve().parents[2]

TURNED = {  # EXIF's orientation: where the stored picture's upper left corner is seen
    1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0),
}  # fmt: skip


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_turned_as_exif_says(tmp_path, format, orientation):
    picture, exif = Image.new("RGB", (48, 32)), Image.Exif()
    picture.paste("white", (0, 0, 16, 16))
    exif[0x0112] = orientation
    picture.save(tmp_path / "p", format, exif=exif)
    seen = open_image(tmp_path / "p")
    assert seen.size == ((48, 32) if orientation < 5 else (32, 48)) and seen.mode == "RGB"
    row, column = TURNED[orientation]
    grey = np.asarray(seen.convert("L"))
    assert grey[row, column] > 200
    assert [grey[r, c] > 200 for r in (0, -1) for c in (0, -1)].count(True) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", ["", "nothing", "II*\0\xff\xff\xff\xff", "MM\0*\0\0", "MM\0%"])
def test_broken_exif_does_not_cost_the_picture(tmp_path, format, exif):
    exif = b"Exif\0\0" + exif.encode("latin-1")
    Image.new("RGB", (40, 30), "white").save(tmp_path / "p", format, exif=exif)
    assert open_image(tmp_path / "p").size == (40, 30)


RAMP = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)


@pytest.mark.parametrize("name, values", [
    ("png", (RAMP * 65535).astype(np.uint16)),
    ("tif", (RAMP * 65535).astype(np.uint16)),
    ("tif", (RAMP * 65535).astype(">u2")),
    ("tif", (RAMP * 65535).astype(np.int32)),
    ("tif", (RAMP * 255).astype(np.int32)),
    ("tif", (RAMP * 2e9).astype(np.int32)),
    ("tif", (RAMP * 2000 - 1000).astype(np.int32)),
    ("tif", RAMP),
    ("tif", RAMP * 255),
    ("tif", RAMP * 65535),
    ("tif", RAMP * 2e30 - 1e30),
    ("tif", np.where(RAMP == RAMP[0, 0], np.float32(np.nan),
                     np.where(RAMP == 1, np.float32(np.inf), RAMP))),
])  # fmt: skip
def test_more_than_eight_bits_of_grey_are_scaled(tmp_path, name, values):
    path = tmp_path / f"g.{name}"
    Image.fromarray(values).save(path)
    seen = np.asarray(open_image(path)).astype(int)
    assert seen.shape == (30, 40, 3) and (seen[..., 0] == seen[..., 2]).all()
    assert np.abs(seen[..., 0] - RAMP * 255).max() <= 1.01


@pytest.mark.parametrize(
    "values", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.full((4, 4), 1e38)]
)
def test_a_picture_of_one_grey_is_no_error(tmp_path, values):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "g.tif")
    assert len(set(np.asarray(open_image(tmp_path / "g.tif")).flatten().tolist())) == 1


@pytest.mark.parametrize("mode, format", [
    ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF"), ("P", "PNG"),
    ("P", "GIF"), ("1", "PNG"), ("L", "BMP"), ("RGBA", "WEBP"),
])  # fmt: skip
def test_colours_of_every_mode_are_those_that_were_drawn(tmp_path, mode, format):
    picture = Image.new("RGB", (40, 30), (255, 255, 255))
    picture.paste((0, 0, 0) if mode in "1L" else (200, 30, 40), (0, 0, 40, 15))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        stored = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
    else:
        stored = picture.quantize(8) if mode == "P" else picture.convert(mode)
    stored.save(tmp_path / "p", format)
    seen = np.asarray(open_image(tmp_path / "p")).astype(int)
    assert np.abs(seen - np.asarray(picture)).mean() < 6


@pytest.mark.parametrize("picture, options", [
    (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), {}), (Image.new("LA", (4, 4), (0, 0)), {}),
    (Image.new("P", (4, 4), 0), {"transparency": 0}),
    (Image.new("L", (4, 4), 0), {"transparency": 0}),
    (Image.new("RGB", (4, 4), 0), {"transparency": (0, 0, 0)}),
])  # fmt: skip
def test_what_is_transparent_is_white(tmp_path, picture, options):
    picture.save(tmp_path / "clear.png", **options)
    assert open_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(tmp_path, format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a", format, save_all=True, append_images=frames[1:])
    red, _, blue = open_image(tmp_path / "a").getpixel((4, 4))
    assert red > 240 and blue < 20


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checked

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 99)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def saved(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
NONE = "none of PNG"


@pytest.mark.parametrize("name, content, says", [
    ("a.png", saved(NOISE, "EPS"), NONE), ("a.png", saved(NOISE, "PPM"), NONE),
    ("a.jpg", saved(NOISE, "ICO"), NONE),
    ("a.png", saved(NOISE, "PDF"), NONE), ("a.png", b"", NONE), ("a.png", b"<svg/>", NONE),
    ("a.png", b"P6 99999 99999 255 ", NONE),
    ("a.png", png_header(0, 5), ""), ("a.png", png_header(5, 0), ""),
    ("a.png", png_header(60000, 60000), "pixels"),
    ("a.png", png_header(10000, 9000), "10000 x 9000 pixels"),
    ("a.bmp", saved(NOISE, "BMP")[:18] + struct.pack("<ii", 2**30, 2**30)
     + saved(NOISE, "BMP")[26:], "pixels"),
    *((f"a.{format}", saved(NOISE, format)[:2000], "") for format in FORMATS),
    ("a.png", saved(Image.new("L", (1608, 8)), "PNG"), "too long a strip"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_used_has_a_reason_and_no_warning(tmp_path, capfd, name, content, says):
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # as at import
        problem, size = look_into(tmp_path / name)
    assert problem and says in problem and "\n" not in problem and size is None and not warned
    assert str(tmp_path) not in problem


def test_a_decompression_bomb_has_one_reason_and_nothing_on_stderr(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(10000, 9000))  # Pillow would only warn
    script = f"from data import pictures; print(pictures.look_into({str(tmp_path / 'bomb.png')!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("('10000 x 9000 pixels', None)\n", "")


def test_size_is_that_of_the_picture_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "p.jpg", exif=exif)
    assert look_into(tmp_path / "p.jpg") == (None, [30, 40])


def test_an_image_that_changes_while_training_is_told_in_a_line(tmp_path):
    images = ImageFiles([tmp_path / "gone.png", tmp_path / "other.png"])
    (tmp_path / "other.png").write_bytes(saved(NOISE, "EPS"))
    for i, name in enumerate(("gone.png", "other.png")):
        with pytest.raises(UserError, match=name) as error:
            images[i]
        assert "\n" not in str(error.value)
    with pytest.raises(IndexError):
        images[2]
