"""Rule 30: every odd file decodes correctly or is rejected with its reason."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from packshot.imaging.decode import DecodeError, decode_image, flatten

RNG = np.random.default_rng(0)


def picture(width=40, height=24):
    """Four colours in the corners, so that orientation shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    return Image.fromarray(pixels)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(data, **options):
    with pytest.raises(DecodeError) as caught:
        decode_image(data, "shoe.png", **options)
    assert "shoe.png" in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.asarray(picture())
    # What a camera stores so that the viewer's transform gives the upright picture (EXIF 2.3, 4.6.4 A).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data, "x")), upright)


def test_cmyk_becomes_rgb():
    image = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), "x")
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    image = decode_image(encode(Image.fromarray(ramp), format), "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.round(ramp / 257).astype(np.uint8))


def test_samples_without_a_white_level_are_refused():
    assert reason(encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")) == "unsupported_depth"


def test_palette_with_alpha_keeps_its_alpha():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((3, 3), 1)
    decoded = decode_image(encode(image, "PNG", transparency=0), "x")
    assert decoded.mode == "RGBA"
    assert decoded.getpixel((0, 0))[3] == 0
    assert decoded.getpixel((3, 3)) == (0, 255, 0, 255)


def test_opaque_alpha_channel_is_dropped():
    assert decode_image(encode(picture().convert("RGBA"), "PNG"), "x").mode == "RGB"


def test_colours_under_transparency_do_not_leak_when_flattened():
    pixels = RNG.integers(0, 256, (16, 16, 4), np.uint8)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 255
    flat = np.asarray(flatten(decode_image(encode(Image.fromarray(pixels), "PNG"), "x")))
    assert (flat[:8] == 255).all()
    np.testing.assert_array_equal(flat[8:], pixels[8:, :, :3])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert decode_image(data, "x").convert("RGB").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_rejected(format):
    data = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), format)
    assert reason(data[: len(data) // 2]) in ("truncated", "damaged", "not_an_image")


def test_zero_bytes_text_and_missing_files_are_rejected(tmp_path):
    assert reason(b"") == "empty_file"
    assert reason(b"This is my shopping list, and not a picture at all.") == "not_an_image"
    assert reason(tmp_path / "gone.png") == "unreadable"


def test_heic_is_named():
    assert reason(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 64) == "unsupported_format"


def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decompressed"))
    assert reason(encode(Image.new("1", (3000, 3000)), "PNG"), max_pixels=1_000_000) == "too_many_pixels"
    assert reason(encode(Image.new("1", (20_000, 10_000)), "PNG"), max_pixels=50_000_000) == "too_many_pixels"


def test_the_limit_may_be_above_pillows_own_which_stays_as_it_is(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encode(picture(40, 24), "PNG"), "x", max_pixels=960).size == (40, 24)
    assert reason(encode(picture(40, 25), "PNG"), max_pixels=960) == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS == 100
    assert [str(warning.message) for warning in recwarn if "(960 pixels)" in str(warning.message)] == []


def test_whoever_is_refused_for_size_is_not_sent_to_a_key_that_script_lacks():
    with pytest.raises(DecodeError) as caught:
        decode_image(encode(picture(), "PNG"), "shoe.png", max_pixels=100)
    assert "quality.max_pixels" not in caught.value.hint


def test_content_decides_not_the_extension(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(encode(picture(), "JPEG", quality=95))
    assert decode_image(file, "photo.png").size == (40, 24)


def test_srgb_profile_keeps_the_bytes_and_another_profile_converts():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = picture()
    same = decode_image(encode(source, "PNG", icc_profile=srgb), "x")
    np.testing.assert_array_equal(np.asarray(same), np.asarray(source))
    broken = decode_image(encode(source, "PNG", icc_profile=b"no profile" * 20), "x")
    np.testing.assert_array_equal(np.asarray(broken), np.asarray(source))
    # A wide-gamut profile: sRGB's own with a name of the same length that is not sRGB's, and red and blue swapped.
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    other = swapped.replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be")).replace(b"sRGB", b"wide")
    red = decode_image(encode(Image.new("RGB", (4, 4), (250, 10, 10)), "PNG", icc_profile=other), "x").getpixel((1, 1))
    assert red[2] > red[0]
