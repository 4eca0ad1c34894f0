"""Rule 30: every odd file decodes correctly or is rejected with its reason."""

import io
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from packshot.imaging.decode import DecodeError, decode, decode_image, flatten

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


def test_heic_without_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("packshot.imaging.decode._reads_heif", lambda: False)
    assert reason(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 64) == "unsupported_format"


def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decompressed"))
    assert reason(encode(Image.new("1", (3000, 3000)), "PNG"), max_pixels=1_000_000) == "too_many_pixels"
    assert reason(encode(Image.new("1", (20_000, 10_000)), "PNG"), max_pixels=50_000_000) == "too_many_pixels"


def test_the_limit_may_be_above_pillows_own(monkeypatch, recwarn):
    """Pillow's own limit is not changed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encode(picture(40, 24), "PNG"), "x", max_pixels=960).size == (40, 24)
    assert reason(encode(picture(40, 25), "PNG"), max_pixels=960) == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS == 100
    assert [str(warning.message) for warning in recwarn if "(960 pixels)" in str(warning.message)] == []


def test_a_size_error_names_a_key_of_the_script():
    with pytest.raises(DecodeError) as caught:
        decode_image(encode(picture(), "PNG"), "shoe.png", max_pixels=100)
    assert "quality.max_pixels" not in caught.value.hint


def test_content_decides_not_the_extension(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(encode(picture(), "JPEG", quality=95))
    assert decode_image(file, "photo.png").size == (40, 24)


def test_an_srgb_profile_keeps_the_bytes():
    """Another profile is converted."""
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


def adobe_rgb(image):
    """The pixels of an sRGB picture as Adobe RGB would hold them."""
    from packshot.imaging import profiles

    light = profiles.srgb_light(np.asarray(image) / 255.0)
    matrix = np.linalg.solve(profiles.to_xyz(profiles._ADOBE), profiles.to_xyz(profiles._SRGB))
    return Image.fromarray(np.rint((light @ matrix.T).clip(0, 1) ** (256 / 563) * 255).astype(np.uint8))


def named_profile(gamma, name):
    """sRGB's primaries with a plain gamma, under any name: a matrix profile."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(int.from_bytes(srgb[128:132], "big")):
        at = 132 + 12 * entry
        if bytes(srgb[at : at + 4]) in (b"rTRC", b"gTRC", b"bTRC"):
            place = int.from_bytes(srgb[at + 4 : at + 8], "big")
            srgb[place : place + 16] = (
                b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
            )
    assert name in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(bytes(srgb))))
    return bytes(srgb)


def test_a_profile_is_judged_by_what_it_does():
    """A linear profile that calls itself sRGB used to be taken for sRGB, and red products came out dark."""
    red = Image.new("RGB", (8, 8), (200, 20, 20))
    linear = named_profile(1.0, "sRGB")
    image, steps = decode(encode(red, "PNG", icc_profile=linear), "x")
    expected = 255 * (1.055 * (np.array([200, 20, 20]) / 255) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(np.asarray(image)[0, 0], expected, atol=2)
    assert steps == ["from sRGB built-in to sRGB"]
    assert decode(encode(red, "PNG", icc_profile=named_profile(2.2, "sRGB")), "x")[1] != []


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_gamma_of_a_png_is_applied(gamma):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", round(100000 / gamma).to_bytes(4, "big"))
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    image, steps = decode(encode(grey, "PNG", pnginfo=info), "x")
    light = (100 / 255) ** gamma
    assert abs(image.getpixel((0, 0))[0] - 255 * (1.055 * light ** (1 / 2.4) - 0.055)) <= 1
    assert steps == ["from gAMA to sRGB"]


def test_gamma_that_stands_for_srgb_changes_nothing():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    assert decode(encode(picture(), "PNG", pnginfo=info), "x")[1] == []


def with_chunk(png, name, content):
    """A PNG with one more chunk behind its header."""
    chunk = len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


def test_display_p3_by_a_cicp_chunk_is_converted():
    grey, red = Image.new("RGB", (4, 4), (90, 90, 90)), Image.new("RGB", (4, 4), (200, 60, 60))
    p3 = bytes((12, 13, 0, 1))
    assert decode_image(with_chunk(encode(grey, "PNG"), b"cICP", p3), "x").getpixel((0, 0)) == (90, 90, 90)
    seen = decode_image(with_chunk(encode(red, "PNG"), b"cICP", p3), "x").getpixel((0, 0))
    assert seen[0] > 208
    assert seen[1] < 60
    _, steps = decode(with_chunk(encode(red, "PNG"), b"cICP", bytes((9, 16, 0, 1))), "x")
    assert steps == ["cICP colours 9/16 (HDR or rare), read as sRGB"]
    assert decode(with_chunk(encode(red, "PNG"), b"cICP", bytes((1, 13, 0, 1))), "x")[1] == []


def test_adobe_rgb_by_exif_is_converted():
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 0xFFFF
    red = Image.new("RGB", (32, 32), (190, 60, 50))
    _, steps = decode(encode(red, "JPEG", quality=98, exif=exif), "x")
    assert steps == ["Exif calls its colours uncalibrated, read as sRGB"]
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R03"}
    image, steps = decode(encode(adobe_rgb(red), "JPEG", quality=98, subsampling=0, exif=exif), "x")
    assert steps == ["from Exif R03 (Adobe RGB) to sRGB"]
    np.testing.assert_allclose(image.getpixel((9, 9)), (190, 60, 50), atol=4)


def test_a_grey_profile_is_applied_to_grey_pictures():
    grey = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + (256).to_bytes(2, "big") + b"\0\0"
    white = b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1, 0.8249))
    tags = ((b"kTRC", curve), (b"wtpt", white))
    table, body, at = (len(tags)).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + (at + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content
    header = bytearray(grey[:128])
    header[16:20], header[0:4] = b"GRAY", (128 + len(table) + len(body)).to_bytes(4, "big")
    image, steps = decode(encode(Image.new("L", (4, 4), 60), "PNG", icc_profile=bytes(header) + table + body), "x")
    assert image.getpixel((0, 0))[0] == pytest.approx(255 * (1.055 * (60 / 255) ** (1 / 2.4) - 0.055), abs=2)
    assert steps


def test_heic_is_read_with_the_extra(monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encode(Image.new("RGB", (64, 64), (200, 30, 30)), "HEIF", quality=90)
    assert decode_image(data, "x").size == (64, 64)
    monkeypatch.setattr("packshot.imaging.decode._reads_heif", lambda: False)
    with pytest.raises(DecodeError, match="needs the package pillow-heif"):
        decode_image(data, "x")
