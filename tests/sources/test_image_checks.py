"""Laws of headers: what a conversion to RGB destroys is refused or told by file, and Pillow's limits are one line."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from PIL import PngImagePlugin

from etf_adapt.errors import DataError
from etf_adapt.sources.image_checks import check_images


def check(folder, contents, **kinds):
    """Write one file for each content, an image or bytes, and check their headers."""
    files = []
    for row, content in enumerate(contents):
        file = folder / f"{row}.{kinds.get('suffix', 'png')}"
        file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
        files.append(str(file))
    rows = Dataset.from_dict({"image": files}, features=Features({"image": Image()}))
    reported = []
    check_images(rows, rows=np.arange(len(files)), split="test", report=reported.append)
    assert reported == [len(files)]


def made(mode, **info):
    image = PILImage.new(mode, (4, 4))
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "tif"), ("F", "tif"), ("I", "pgm"), ("F", "pfm")],
)
def test_pixels_of_more_than_8_bits_are_refused_and_counted(tmp_path, mode, suffix):
    fine = made("L") if suffix != "pfm" else made("F")
    with pytest.raises(DataError) as caught:
        check(tmp_path, [*([fine] if suffix != "pfm" else []), made(mode), made(mode), made(mode)], suffix=suffix)
    assert f"{int(suffix != 'pfm')}.{suffix}`) (and 2 more of this split)" in str(caught.value)
    assert "255" in str(caught.value) and "8 bits" in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_pixels_of_8_bits_are_taken_without_a_word(tmp_path, mode, caplog):
    suffix = "png" if mode in ("1", "L", "P", "RGB") else "tif"
    check(tmp_path, [made(mode)] * 3, suffix=suffix)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "image", [made("RGBA"), made("LA"), made("P", transparency=0), made("RGB", transparency=(0, 0, 0))]
)
def test_transparency_is_told_once_with_file_and_count(tmp_path, image, caplog):
    check(tmp_path, [made("L"), image, image])
    assert len(caplog.messages) == 1
    assert "1.png`) (and 1 more of this split)" in caplog.text and "alpha" in caplog.text


def test_limits_of_pillow_are_one_line_with_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10)
    with pytest.warns(PILImage.DecompressionBombWarning):
        check(tmp_path, [made("L")])
    assert "0.png" in caplog.text and "smaller" in caplog.text
    large = PILImage.new("L", (32, 32))
    stream = io.BytesIO()
    large.save(stream, "PNG")
    with pytest.raises(DataError, match=r"Row 0 of split test .*0\.png.*exceeds limit") as caught:
        check(tmp_path, [stream.getvalue()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_in_a_png_beyond_pillows_limit_is_one_line_with_the_file(tmp_path, kind):
    info = PngImagePlugin.PngInfo()
    packed = zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    info.add(kind, b"note\0\0" + packed if kind == b"zTXt" else b"note\0\1\0\0\0" + packed)
    stream = io.BytesIO()
    made("L").save(stream, "PNG", pnginfo=info)
    with pytest.raises(DataError, match=r"Row 0 of split test .*0\.png.*cannot be read: ") as caught:
        check(tmp_path, [stream.getvalue()])
    assert "\n" not in str(caught.value)
