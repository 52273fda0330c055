"""support/pixel_range.py: images of more than 8 bits, one range for a whole data set, whatever their type holds."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import FOLDER, assert_same, assert_same_run, checkpoint, epoch_of, noise, run_dcgan, write_images
from PIL import Image

import dcgan
from data import OLD_READING, ReadSettings, load_images
from support.decoding import prepare
from support.pixel_range import PixelRange, choose_range

pytestmark = pytest.mark.usefixtures("isolated")


def png(pixels, color_type, extra=b""):
    """Return a PNG file of uint16 values (height, width) or (height, width, channels), which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">2I5B", width, height, 16, color_type, 0, 0, 0)
    extra = chunk(b"tRNS", extra) if extra else b""
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def gradients(count, top, dtype=np.uint16, side=16):
    """Return images of values from 0 to `top`, each in another order."""
    values = np.linspace(0, top, side * side).reshape(side, side).astype(dtype)
    return [np.roll(values, 7 * i) for i in range(count)]


def write_arrays(folder, arrays, kind="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{i:03d}.{kind}")


def rows_of(images):
    """Return the prepared images in the order of their names."""
    if isinstance(images.array, np.ndarray):
        return np.array(images.array)
    return np.stack([images.array[i][0] for i in range(len(images))])


# Integers


@pytest.mark.parametrize("cache", ["none", None])
@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_files_are_scaled_by_the_bits_they_use(bits, kind, cache, tmp_path):
    arrays = gradients(5, 2**bits - 1)
    arrays[2][0, 0] = 65535 if bits == 16 else 2**bits  # a hot pixel: more than the bits, in fewer than 0.1 percent
    write_arrays(tmp_path / "in", arrays, kind)
    images = load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1), cache=cache)
    expected = [np.minimum(values.astype(int) // 2 ** (bits - 8), 255)[None] for values in arrays]
    assert np.array_equal(rows_of(images), expected)
    said = [f"images of 16 bits: values of 0 to {2**bits - 1:,} become 0 to 255"]
    assert list(images.notes) == (said if bits < 16 else [])


def test_one_range_holds_for_all_images(tmp_path):
    """A dark image among others stays dark."""
    write_arrays(tmp_path / "in", [*gradients(5, 4095), np.full((16, 16), 160, np.uint16)])
    assert (rows_of(load_images("folder", tmp_path / "in", 16))[5] == 160 // 16).all()


def test_images_of_8_bits_in_the_same_folder_stay_as_they_are(tmp_path):
    write_arrays(tmp_path / "in", gradients(5, 4095))
    noise(16, 16).save(tmp_path / "in" / "x.png")
    assert np.array_equal(
        rows_of(load_images("folder", tmp_path / "in", 16))[5], np.moveaxis(np.array(noise(16, 16)), 2, 0)
    )


def test_integers_below_zero_or_of_more_bits_get_their_own_range(tmp_path):
    """As of computed tomography, in Hounsfield units."""
    values = [values - 1000 for values in gradients(5, 4000, np.int32)]
    write_arrays(tmp_path / "in", values, "tif")
    images = load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1))
    low, high = np.percentile(np.stack(values), (0.1, 99.9))
    expected = np.clip((np.stack(values) - low) * 255 / (high - low), 0, 255)
    assert np.abs(rows_of(images)[:, 0] - expected).max() <= 0.51
    assert images.notes == [f"images of integers: values of {low:.4g} to {high:.4g} become 0 to 255"]


# Floats


@pytest.mark.parametrize(
    ("bottom", "top", "expected"),
    [(0, 1, (0, 1)), (0.1, 0.9, (0, 1)), (0, 255, (0, 255)), (0, 0.01, None), (-1, 1, None), (300, 5000, None)],
)
def test_floats_get_a_range(bottom, top, expected, tmp_path):
    values = [(bottom + values * (top - bottom)).astype(np.float32) for values in gradients(5, 1, float)]
    write_arrays(tmp_path / "in", values, "tif")
    images = load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1))
    low, high = expected or np.percentile(np.stack(values), (0.1, 99.9))
    wanted = np.clip((np.stack(values) - low) * 255 / (high - low), 0, 255)
    assert np.abs(rows_of(images)[:, 0] - wanted).max() <= 0.51
    assert images.notes == [f"images of floats: values of {low:.4g} to {high:.4g} become 0 to 255"]


def test_8_bit_values_come_back_from_floats_exactly(tmp_path):
    values = np.arange(256).reshape(16, 16)
    write_arrays(tmp_path / "a", [(values / 255).astype(np.float32)], "tif")
    write_arrays(tmp_path / "b", [values.astype(np.float32)], "tif")
    for folder in ("a", "b"):
        assert np.array_equal(
            rows_of(load_images("folder", tmp_path / folder, 16, settings=ReadSettings(nc=1)))[0, 0], values
        )


def test_values_that_are_no_numbers_do_not_spoil_the_range(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    values[0, :3] = np.nan, np.inf, -np.inf
    write_arrays(tmp_path / "in", [values], "tif")
    row = rows_of(load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1)))[0, 0]
    assert row[0, :3].tolist() == [0, 255, 0]
    assert np.abs(row[1:] - values[1:] * 255).max() <= 0.51


@pytest.mark.parametrize("value", [0, 7, 1e6])
def test_a_range_of_one_value_is_possible(value, tmp_path):
    write_arrays(tmp_path / "in", [np.full((16, 16), value, np.float32)], "tif")
    load_images("folder", tmp_path / "in", 16)


def test_a_range_needs_no_images_of_more_than_8_bits():
    assert choose_range([]) == PixelRange()


# Transparency


@pytest.mark.parametrize("bits", [12, 16])
def test_grey_of_16_bits_with_alpha_keeps_its_bits(bits, tmp_path):
    (tmp_path / "in").mkdir()
    for i, grey in enumerate(gradients(4, 2**bits - 1)):
        alpha = np.full_like(grey, 65535)
        alpha[:4] = 0
        (tmp_path / "in" / f"{i}.png").write_bytes(png(np.stack([grey, alpha], -1), 4))
    rows = rows_of(load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1)))
    expected = np.stack(gradients(4, 2**bits - 1))[:, None] >> (bits - 8)
    expected[:, :, :4] = 255  # white
    assert np.array_equal(rows, expected)


def test_grey_of_16_bits_with_a_transparent_value_is_on_white(tmp_path):
    grey = gradients(1, 65535)[0]
    grey[5:9, 5:9] = 0x1234
    image = Image.open(io.BytesIO(png(grey, 0, struct.pack(">H", 0x1234))))
    expected = np.where(grey == 0x1234, 255, grey >> 8)
    assert np.array_equal(prepare(image, 16, 1)[0], expected)
    grey[grey == 0x1234] = 65535  # a mark that no value comes near
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(np.where(grey == 65535, 65535, grey >> 4), 0, b"\xff\xff"))
    row = rows_of(load_images("folder", tmp_path / "in", 16, settings=ReadSettings(nc=1)))[0, 0]
    assert np.array_equal(row, np.where(grey == 65535, 255, grey >> 8))


def bmp(pixels):
    """Return a BMP file of uint8 RGBA pixels with a channel for alpha, which Pillow does not write."""
    height, width, _ = pixels.shape
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, 4 * width * height, 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    rows = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    return struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


def tga(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "TGA")
    return file.getvalue()


@pytest.mark.parametrize("write", [bmp, tga])
def test_alpha_that_is_zero_everywhere_is_not_used(write):
    pixels = np.array(noise(16, 16, "RGBA"))
    pixels[..., 3] = 0
    assert Image.open(io.BytesIO(write(pixels))).mode == "RGBA"
    row = prepare(Image.open(io.BytesIO(write(pixels))), 16, 3)
    assert np.array_equal(row, np.moveaxis(pixels[..., :3], 2, 0))
    pixels[:8, :, 3] = 255  # the lower half is transparent
    row = prepare(Image.open(io.BytesIO(write(pixels))), 16, 3)
    pixels[8:] = 255
    assert np.array_equal(row, np.moveaxis(pixels[..., :3], 2, 0))


def test_a_transparent_png_stays_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (prepare(Image.open(tmp_path / "a.png"), 16, 3) == 255).all()


# In a run


OPTIONS = [*FOLDER, "--workers", 0, "--niter", 2, "--batchSize", 4, "--manualSeed", 3]


@pytest.mark.parametrize("cache", ["none", "cache"])
def test_a_run_keeps_its_range_when_it_resumes(cache, tmp_path, capsys, monkeypatch):
    write_arrays(tmp_path / "in", gradients(8, 4095))
    options = [*OPTIONS, "--dataroot", tmp_path / "in", "--cache", cache]
    assert run_dcgan(tmp_path / "whole", *options) == 0
    said = capsys.readouterr()
    assert said.out.count("note: images of 16 bits: values of 0 to 4,095 become 0 to 255\n") == 1
    assert said.err == ""
    assert run_dcgan(tmp_path / "out", *options, "--niter", 1) == 0
    monkeypatch.setattr("support.survey.choose_range", lambda _: PixelRange(14))  # as if other files were looked at
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert run_dcgan(tmp_path / "out", "--resume", "--niter", 2, "--cache", "other" if cache != "none" else "none") == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert "values of 0 to 4,095" in capsys.readouterr().out


def test_a_run_that_an_earlier_version_began_keeps_its_range(tmp_path, monkeypatch, capsys):
    """Also where a new run's array of the same images is cached."""
    write_arrays(tmp_path / "in", gradients(8, 4095))
    options = [*OPTIONS, "--dataroot", tmp_path / "in"]
    assert run_dcgan(tmp_path / "out", *options, "--niter", 1) == 0
    state = checkpoint(tmp_path / "out")
    del state["reading"], state["data"]
    torch.save(state, tmp_path / "out" / "checkpoint.pth")
    trained = []
    monkeypatch.setattr(dcgan, "train", lambda run: trained.append(run.images) or 0)
    for cache in ("cache", "none", "cache"):
        cache = tmp_path / cache / "dcgan" if cache == "cache" else cache
        assert run_dcgan(tmp_path / "out", "--resume", "--cache", cache) == 0
        assert trained[-1].reading == OLD_READING
        assert np.array_equal(rows_of(trained[-1]).max((1, 2, 3)), [15] * 8)
    assert run_dcgan(tmp_path / "new", *options) == 0
    assert rows_of(trained[-1]).max() == 255


def test_an_array_of_an_earlier_version_keeps_its_range(tmp_path):
    write_arrays(tmp_path / "in", gradients(8, 4095))
    path = load_images("folder", tmp_path / "in", 16).path
    rows = np.load(path) // 16
    np.save(path, rows)
    path.with_suffix(".json").write_text("[]")
    again = load_images("folder", tmp_path / "in", 16)
    assert (again.path, rows_of(again).max()) == (path, 15)
    assert list(again.notes) == []
    path.unlink()
    assert rows_of(load_images("folder", tmp_path / "in", 16)).max() == 255


@pytest.mark.parametrize("cache", ["none", "cache"])
def test_images_that_use_little_of_the_range_are_warned_of(cache, tmp_path, capsys):
    """Colour of 12 bits in 16, of which Pillow gives the upper byte."""
    (tmp_path / "in").mkdir()
    for i, grey in enumerate(gradients(8, 4095)):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(np.stack([grey] * 3, -1), 2))
    options = [*OPTIONS, "--dataroot", tmp_path / "in", "--cache", cache]
    words = "warning: the prepared images use only the values 0 to 15 of 0 to 255, as real_samples.png shows: rescale"
    assert run_dcgan(tmp_path / "out", *options) == 0
    assert capsys.readouterr().err.count(words) == 1
    if cache != "none":
        assert run_dcgan(tmp_path / "out", "--resume") == 0
        assert capsys.readouterr().err.count(words) == 1


def test_streamed_and_cached_images_of_16_bits_are_equal(tmp_path):
    write_arrays(tmp_path / "in", gradients(9, 1023))
    write_images(tmp_path / "in", "x.jpg", "y.png")
    streamed, cached = (load_images("folder", tmp_path / "in", 16, cache=cache) for cache in ("none", None))
    assert_same(epoch_of(streamed), epoch_of(cached))
