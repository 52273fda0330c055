"""Decoding: one image against torchvision's pixels, images that cannot be read, and the processes that decode."""

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    FOLDER,
    ROOT,
    assert_same,
    children,
    contents,
    epoch_of,
    expected_contents,
    fork,
    is_alive,
    noise,
    run_dcgan,
    run_dcgan_forked,
    torchvision_pixels,
    write_images,
    write_lmdb,
)
from PIL import Image
from torch.utils.data import dataloader
from torchvision import transforms

import data
from data import load_images
from support.decoding import prepare
from support.errors import UserError
from support.sources import Source
from support.workers import worker_init

SIZES = [(16, 16), (17, 16), (37, 53), (53, 37), (7, 5), (1, 1), (1, 30), (30, 1), (333, 20), (20, 333), (178, 218)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(1, 90, (30, 2)).tolist()]

pytestmark = pytest.mark.usefixtures("isolated")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# One image


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize("size", [16, 20, 28, 64])
def test_prepare_equals_torchvision_in_every_pixel(size, nc):
    for seed, (width, height) in enumerate(SIZES):
        image = noise(width, height, seed=seed)
        pixels = prepare(image.copy(), size, nc)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, torchvision_pixels(image, size, nc)), (width, height)


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize("crop", [1, 20, 31, 140])
def test_crop_takes_the_centre_and_of_small_images_the_largest_square(crop, nc):
    for seed, (width, height) in enumerate(SIZES):
        image = noise(width, height, seed=seed)
        square = transforms.CenterCrop(min(crop, width, height))(image)
        assert np.array_equal(prepare(image.copy(), 16, nc, crop=crop), torchvision_pixels(square, 16, nc))


def test_the_centre_is_that_of_the_upright_image_and_its_transparency_counts(tmp_path):
    corners, exif = Image.new("RGBA", (21, 40), "red"), Image.Exif()
    corners.paste((0, 0, 255, 0), (5, 10, 15, 20))  # what is shown there is white
    exif[0x112] = 6  # as the camera stored it: the square is above the centre, and once turned to its right
    corners.save(tmp_path / "a.png", exif=exif)
    assert (prepare(Image.open(tmp_path / "a.png"), 16, 3, crop=140) != 255).any()
    upright = corners.rotate(-90, expand=True)
    left, top = round((40 - 9) / 2), round((21 - 9) / 2)
    square = Image.alpha_composite(Image.new("RGBA", (40, 21), "white"), upright).crop((left, top, left + 9, top + 9))
    assert np.array_equal(prepare(Image.open(tmp_path / "a.png"), 16, 3, crop=9), torchvision_pixels(square, 16))


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_prepare_turns_images_upright(orientation, quarter_turns, tmp_path):
    upright, exif = noise(24, 16), Image.Exif()
    exif[0x112] = orientation  # 6: the camera stored the image turned once counter-clockwise
    stored = np.ascontiguousarray(np.rot90(np.asarray(upright), quarter_turns))
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(prepare(Image.open(tmp_path / "a.png"), 16, 3), torchvision_pixels(upright, 16))


def transparent(mode):
    """Return a white image with a transparent middle, which hides red (black where there is no red), and its options.

    The options are those of save().
    """
    mask = Image.new("L", (20, 20), 255)
    mask.paste(0, (5, 5, 15, 15))
    image = Image.new("RGB", (20, 20), "white")
    image.paste("red", (5, 5, 15, 15))
    if mode == "RGB":
        return image, {"transparency": (255, 0, 0)}
    if mode == "P":
        image = image.quantize(2)
        return image, {"transparency": image.getpixel((10, 10))}
    image = image.convert(mode)
    image.putalpha(mask)
    return image, {}


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"), ("RGB", "png"), ("P", "png"), ("P", "gif")]
)
def test_what_transparency_hides_does_not_show(mode, kind, nc, tmp_path):
    image, options = transparent(mode)
    image.save(tmp_path / f"a.{kind}", **options, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    assert (prepare(Image.open(tmp_path / f"a.{kind}"), 16, nc) == 255).all()


@pytest.mark.parametrize(
    ("mode", "color", "kind", "rgb"),
    [
        ("RGBA", (255, 0, 0, 128), "png", (255, 127, 127)),
        ("1", 1, "png", (255, 255, 255)),
        ("L", 100, "png", (100, 100, 100)),
        ("LA", (100, 255), "png", (100, 100, 100)),
        ("P", (255, 0, 0), "png", (255, 0, 0)),
        ("P", (0, 0, 255), "gif", (0, 0, 255)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("CMYK", (255, 0, 255, 0), "jpg", (0, 255, 0)),
        ("I;16", 0x4080, "png", (64, 64, 64)),
        ("I;16", 0x4080, "tiff", (64, 64, 64)),
        ("I;16B", 0x4080, "tiff", (64, 64, 64)),
        ("I", 0x4080, "pgm", (64, 64, 64)),
    ],
)
def test_every_mode_keeps_its_color(mode, color, kind, rgb, tmp_path):
    path = tmp_path / f"a.{kind}"
    Image.new(mode, (9, 12), color).save(path)
    assert np.abs(prepare(Image.open(path), 16, 3).astype(int) - np.reshape(rgb, (3, 1, 1))).max() <= 1
    red, green, blue = rgb
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R 601
    assert np.abs(prepare(Image.open(path), 16, 1) - grey).max() <= 2


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(kind, tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert prepare(Image.open(tmp_path / f"a.{kind}"), 16, 3).max((1, 2)).tolist() == [255, 0, 0]


def test_an_image_far_too_thin_is_refused_before_it_takes_memory():
    with pytest.raises(ValueError, match="aspect ratio too extreme"):
        prepare(Image.new("L", (100_000, 1)), 64, 1)


# Images that cannot be read


def write_broken(root):
    """Write six files that are no images; return their names."""
    noise(64, 64).save(jpeg := io.BytesIO(), "JPEG")
    noise(64, 64).save(png := io.BytesIO(), "PNG")
    jpeg, png = jpeg.getvalue(), png.getvalue()
    files = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "flipped.png": png[:20] + bytes([png[20] ^ 8]) + png[21:],
        "empty.png": b"",
        "text.jpg": b"Not found",
        "bomb.png": png[:16] + struct.pack(">2I5B", 14_000, 14_000, 8, 2, 0, 0, 0),
    }
    files["bomb.png"] += struct.pack(">I", zlib.crc32(files["bomb.png"][12:])) + png[33:]
    for name, content in files.items():
        (root / name).write_bytes(content)
    return list(files)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", None])
def test_broken_images_are_skipped_by_name_up_to_half(cache, workers, tmp_path):
    root = tmp_path / "in"
    paths = write_images(root, *(f"{i}.png" for i in range(6)))  # 12 in all: the count of the cached loses a digit
    names = write_broken(root)
    images = load_images("folder", root, 16, cache=cache, workers=workers)
    assert sorted(set(contents(images))) == expected_contents(paths)
    assert len(contents(images)) == len(images) == (12 if cache == "none" else 6)
    assert [sum(name in report for report in images.skipped) for name in names] == [1] * 6
    assert len(images.skipped) == 6
    assert "196000000" in next(report for report in images.skipped if "bomb.png" in report)  # it was not decoded
    before = set((tmp_path / "cache").rglob("[!.]*"))
    (root / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"7 of 12 .*(half|flipped|empty|text|bomb|0)\."):
        contents(load_images("folder", root, 16, cache=cache, workers=workers))
    assert set((tmp_path / "cache").rglob("[!.]*")) == before  # nothing half done is left
    assert list((tmp_path / "cache").rglob("*.part")) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_flaws_nor_many_workers_make_libraries_write(workers, tmp_path, monkeypatch, capfd, recwarn):
    """Not Pillow and libtiff, whose image is reported in one line, nor DataLoader, of workers on a single core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    for name, compression in (("lzw", "tiff_lzw"), ("deflate", "tiff_deflate")):
        noise(64, 64).save(file := io.BytesIO(), "TIFF", compression=compression)
        content = file.getvalue()
        middle = len(content) // 3
        (tmp_path / "in" / f"{name}.tif").write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    (tmp_path / "in" / "cut.tif").write_bytes(content[: len(content) // 2])  # without its tags
    images = load_images("folder", tmp_path / "in", 16, workers=workers)
    assert contents(images) == expected_contents(paths)
    assert len(images.skipped) == 3
    messages = [str(warning.message) for warning in recwarn]  # Python 3.12 warns of a fork beside pytest's threads
    assert [message for message in messages if "use of fork() may lead to deadlocks" not in message] == []
    assert capfd.readouterr().err == ""


def test_if_no_image_can_be_read_it_says_so(tmp_path):
    for path in write_images(tmp_path / "in", *(f"{i}.png" for i in range(5))):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"[345] of 5 images cannot be read, first .\.png .*; is --dataroot right"):
        contents(load_images("folder", tmp_path / "in", 16, cache="none"))


def epoch_with_broken_images(folder, count=13, places=(2, 3, 7, 12)):
    """Write images into `folder` and break those that come at `places` of an epoch.

    Return the names of the broken ones, and the contents of an epoch in which each of them is replaced by the next in
    the order that can be read; after the last comes the first.
    """
    write_images(folder, *(f"{i:02d}.png" for i in range(count)))
    order = [row.tobytes() for batch in epoch_of(load_images("folder", folder, 16, cache="none")) for row in batch]
    names = {torchvision_pixels(Image.open(path), 16).tobytes(): path.name for path in folder.iterdir()}
    for place in places:
        (folder / names[order[place]]).write_bytes(b"not an image")
    readable = [None if place in places else row for place, row in enumerate(order)]
    expected = [next(row for row in readable[place:] + readable[:place] if row) for place in range(count)]
    return sorted(names[order[place]] for place in places), expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_in_the_order(workers, tmp_path):
    broken, expected = epoch_with_broken_images(tmp_path / "in")
    images = load_images("folder", tmp_path / "in", 16, cache="none", workers=workers)
    batches = epoch_of(images, 5)
    assert [len(batch) for batch in batches] == [5, 5, 3]  # none shrinks
    assert [row.tobytes() for batch in batches for row in batch] == expected
    assert sorted(images.skipped) == [report for report in sorted(images.skipped) if report.split(" (")[0] in broken]
    assert len(images.skipped) == len(broken)  # each is reported once, though some were met twice
    for world_size in (2, 3):
        shards = [epoch_of(images, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
        joined = [[row.tobytes() for shard in step for row in shard] for step in zip(*shards, strict=True)]
        assert joined == [expected[:6], expected[6:12]]  # the 13th image is left out


def test_broken_images_do_not_shift_the_batches_after_them(tmp_path):
    _, expected = epoch_with_broken_images(tmp_path / "in", 7, (1, 2, 5))
    images = load_images("folder", tmp_path / "in", 16, cache="none")
    for first in range(8):
        batches = epoch_of(images, 1, start=first)
        assert [batch.tobytes() for batch in batches] == expected[first:]


# Workers


@pytest.fixture
def impatient(monkeypatch):
    """DataLoader looks after its processes ten times a second instead of every 5 seconds, as far as torch lets it."""
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)
    iterator = getattr(dataloader, "_MultiProcessingDataLoaderIter", None)
    if hasattr(iterator, "_try_get_data"):
        monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.1,))


@pytest.fixture
def spawn():
    """Processes are spawned, as on macOS and Windows."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


# By default only the hardest: an open database cannot go to a worker. Each worker takes seconds to import torch.
@pytest.mark.parametrize(
    ("dataset", "cache"),
    [
        ("lsun", "none"),
        pytest.param("lsun", None, marks=pytest.mark.slow),
        *(pytest.param(f"folder{kind}", "none", marks=pytest.mark.slow) for kind in ("", ".zip", ".tar.gz", ".npz")),
    ],
)
@pytest.mark.usefixtures("spawn")
def test_workers_can_be_spawned(dataset, cache, tmp_path):
    write_images(tmp_path / "folder", *(f"{i}.png" for i in range(7)))
    write_lmdb(tmp_path / "lsun" / "bedroom_train_lmdb", [noise(seed=i) for i in range(7)])
    for kind in ("zip", "gztar"):
        shutil.make_archive(tmp_path / "folder", kind, tmp_path / "folder")
    np.savez(tmp_path / "folder.npz", np.stack([np.asarray(noise(seed=i)) for i in range(7)]))
    source = dataset.split(".")[0], tmp_path / dataset, 16
    images = load_images(*source, cache=cache, workers=1)
    assert_same(epoch_of(images), epoch_of(load_images(*source, cache=tmp_path / "other")))


def test_what_goes_to_a_worker_can_be_pickled(tmp_path):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(7)))
    order = np.arange(7)[::-1]
    decode = functools.partial(load_images("folder", tmp_path / "in", 16, cache="none").array.decode_in_order, order)
    assert_same(pickle.loads(pickle.dumps(decode))(range(7))[0], decode(range(7))[0])


class Deadly(Source):
    """Images that end the process that decodes them, as the system does if memory is short."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)

    def fingerprint(self):
        return 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cache", ["cache", "none"])
def test_a_killed_worker_is_one_line_and_leaves_nothing(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.SOURCES, "deadly", lambda *_: Deadly())
    options = ["--dataset", "deadly", "--imageSize", 16, "--workers", 1, "--niter", 1]
    assert run_dcgan(tmp_path / "out", *options, "--cache", cache if cache == "none" else tmp_path / cache) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("dcgan.py: decoding images failed (DataLoader worker")
    assert errors.endswith("; --workers 0 decodes without other processes\n")
    if cache == "cache":  # the run folder comes after the images
        assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
        assert not (tmp_path / "out").exists()


@needs_linux
def test_a_worker_leaves_no_signal_handler_in_the_main_process():
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    images = load_images("fake", None, 16, cache="none", workers=2)
    next(images.batches(4, 0, 0))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@needs_linux
def test_a_worker_that_starts_as_an_orphan_ends():
    read, write = os.pipe()
    main = os.getpid()
    if not (child := os.fork()):
        worker_init(main, 0)  # its parent is there
        os.write(write, b"a child stays")
        if not os.fork():
            child = os.getppid()
            while os.getppid() == child:  # until it has ended
                time.sleep(0.001)
            worker_init(child, 0)
            os.write(write, b", and so does an orphan")
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as file:
        assert file.read() == b"a child stays"  # all that came until both had ended


# Processes that are killed


def decoding_workers(process):
    """Return the process ids of a process's children, without the tracker of resources that spawned workers need."""
    found = []
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@needs_linux
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("cache", "count"), [("none", 500), pytest.param("kept", 4_000, marks=pytest.mark.slow)])
def test_workers_killed_at_any_moment_end_the_run_with_a_line(cache, count, tmp_path):
    write_images(tmp_path / "photos", *(f"{i:04d}.png" for i in range(count)))
    options = f"--dataroot ../photos --batchSize 8 --manualSeed 3 --cache {cache} --workers 2 --niter 1000"
    process = fork(run_dcgan_forked, tmp_path / "run", *FOLDER, *options.split())
    while len(decoding_workers(process)) < 2:
        assert process.is_alive()
        time.sleep(0.003)
    end = time.monotonic() + 100
    while process.is_alive() and time.monotonic() < end:  # one that has done its part may be spared
        for worker in decoding_workers(process)[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.01)
    process.join(100)
    errors = (tmp_path / "run" / "errors").read_text()
    assert process.exitcode == 1
    assert "dcgan.py: decoding images failed" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.rglob(".*.part")) == []


@needs_linux
@pytest.mark.usefixtures("impatient")
def test_the_workers_of_a_killed_process_end(tmp_path):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(100)))
    images = load_images("folder", tmp_path / "in", 16, cache="none", workers=2)

    def decode_for_ever():
        while True:
            for _ in images.batches(1, 0, 0):
                time.sleep(0.01)

    process = fork(decode_for_ever)
    while len(workers := children(process.pid)) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    for _ in range(1_000):
        if not any(map(is_alive, workers)):
            break
        time.sleep(0.02)
    assert not any(map(is_alive, workers))


# Memory


@pytest.mark.slow
@needs_linux
def test_the_largest_image_takes_less_than_2_gb(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.zeros((9_459, 9_459, 4), np.uint8)  # just within the limit; transparent, which takes the most
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", compress_level=1)
    command = [sys.executable, ROOT / "tests/programs/decode_memory.py", tmp_path / "in"]
    megabytes, skipped = subprocess.check_output(command, text=True).split(maxsplit=1)
    assert skipped == "[]\n"
    assert 500 < int(megabytes) < 2_000  # it was decoded
