"""The data sets: each answer is compared with torchvision's, a closed form, or the bytes that were written."""

import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

import data
from data import load_images
from support import cartoon
from support.cartoon import draw_cartoon
from support.decoding import prepare
from support.errors import UserError
from support.sources import Source

ROOT = Path(data.__file__).parent
SIZES = [(16, 16), (17, 16), (37, 53), (53, 37), (7, 5), (1, 1), (1, 30), (30, 1), (333, 20), (20, 333), (178, 218)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(1, 90, (30, 2)).tolist()]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No network, the user's cache in tmp_path, and an empty working directory."""

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(datasets, "CelebA", offline)


def noise(width=20, height=24, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def write(root, *names):
    """Write a different picture under each name; return their paths."""
    paths = [Path(root) / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed=zlib.crc32(os.fsencode(path))).save(path)
    return paths


def torchvisions(image, size, nc=3):
    """The reference: what torchvision makes of a PIL image."""
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    return crop(image.convert("RGB" if nc == 3 else "L")).numpy()


def expected(paths, size=16, nc=3):
    return sorted(torchvisions(Image.open(path), size, nc).tobytes() for path in paths)


def contents(images):
    """All pictures, in an order that does not depend on any shuffling."""
    return sorted(row.numpy().tobytes() for batch in images.batches(4, seed=0, epoch=0) for row in batch)


def epoch_of(images, batch_size=4, seed=1, epoch=0, start=0):
    return [batch.numpy().copy() for batch in images.batches(batch_size, seed, epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def refused(*parts, **options):
    """Assert that load_images raises a UserError of one line that has all `parts` in it."""
    with pytest.raises(UserError) as caught:
        load_images(image_size=16, **options)
    assert "\n" not in str(caught.value)
    assert [part for part in parts if str(part) not in str(caught.value)] == []


def lmdb_of(folder, images):
    import lmdb

    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as base, base.begin(write=True) as transaction:
        for image in images:
            image.save(file := io.BytesIO(), "PNG")
            key = hashlib.sha1(file.getvalue()).hexdigest()  # as LSUN has it
            transaction.put(key.encode(), file.getvalue())
    (folder / "lock.mdb").unlink()


# One picture


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize("size", [16, 20, 28, 64])
def test_prepare_equals_torchvision_in_every_pixel(size, nc):
    for seed, (width, height) in enumerate(SIZES):
        image = noise(width, height, seed=seed)
        pixels = prepare(image.copy(), size, nc)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, torchvisions(image, size, nc)), (width, height)


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_prepare_turns_pictures_upright(orientation, quarter_turns, tmp_path):
    upright, exif = noise(24, 16), Image.Exif()
    exif[0x112] = orientation  # 6: the camera stored the picture turned once counter-clockwise
    stored = np.ascontiguousarray(np.rot90(np.asarray(upright), quarter_turns))
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(prepare(Image.open(tmp_path / "a.png"), 16, 3), torchvisions(upright, 16))


def see_through(mode):
    """White, with a middle that is see-through, and red (black where there is no red) below that."""
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
def test_what_transparency_hides_does_not_leak(mode, kind, nc, tmp_path):
    image, options = see_through(mode)
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


# The cache and the batches


def test_a_second_load_decodes_nothing(tmp_path):
    paths = write(tmp_path / "in", "a.png", "b.png", "c.png")
    first = epoch_of(load_images("folder", tmp_path / "in", 16))
    for path in paths:  # what is decoded from now on fails
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = load_images("folder", tmp_path / "in", 16)
    assert same(epoch_of(again), first)
    assert again.skipped == []


def test_the_cache_is_a_plain_array_mapped_from_disk(tmp_path):
    paths = write(tmp_path / "in", *(f"{i}.png" for i in "271936485"))
    images = load_images("folder", tmp_path / "in", 16, cache=tmp_path / "here")
    rows = np.load(next((tmp_path / "here").glob("*.npy")))
    # In the order of the names: that of a folder's listing differs from one machine to the next.
    assert np.array_equal(rows, np.stack([torchvisions(Image.open(path), 16) for path in sorted(paths)]))
    assert isinstance(images.rows, np.memmap)


def test_pictures_that_changed_are_prepared_anew(tmp_path):
    root = tmp_path / "in"
    paths = write(root, "a.png", "b.png")
    load_images("folder", root, 16)
    stat = paths[0].stat()
    noise(seed=99).save(paths[0])
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert contents(load_images("folder", root, 16)) == expected(paths)
    paths += write(root, "c.png")
    assert contents(load_images("folder", root, 16)) == expected(paths)
    paths.pop(1).unlink()
    assert contents(load_images("folder", root, 16)) == expected(paths)
    assert contents(load_images("folder", root, 20)) == expected(paths, 20)
    assert contents(load_images("folder", root, 16, nc=1)) == expected(paths, 16, 1)


@pytest.mark.parametrize("keep", [None, 0, 50, -1])
def test_a_damaged_cache_is_made_again(keep, tmp_path):
    write(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    first = load_images("folder", tmp_path / "in", 16)
    batches, files = epoch_of(first), [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(first.skipped) == 1
    for path in files:
        content = path.read_bytes()
        path.unlink()  # truncated in place, it would take the first array's memory away
        path.write_bytes(content[:keep]) if keep is not None else None
        again = load_images("folder", tmp_path / "in", 16)
        assert same(epoch_of(again), batches)
        assert again.skipped == first.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_and_cached_batches_are_equal_bit_for_bit(workers, tmp_path):
    paths = write(tmp_path / "in", *(f"{i}.png" for i in range(130)))  # more than two processes decode in one go
    cached = load_images("folder", tmp_path / "in", 16, workers=workers)
    streamed = load_images("folder", tmp_path / "in", 16, cache="none", workers=workers)
    assert contents(streamed) == expected(paths)
    for start in (0, 2):
        assert same(epoch_of(cached, 48, 7, 3, start), epoch_of(streamed, 48, 7, 3, start))


@pytest.mark.parametrize("cache", [None, "none"])
def test_batches_follow_from_seed_and_epoch_alone(cache, tmp_path):
    paths = write(tmp_path / "in", *(f"{i}.png" for i in range(14)))
    images = load_images("folder", tmp_path / "in", 16, cache=cache)
    torch.manual_seed(1)
    epochs = {(seed, epoch): epoch_of(images, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for batches in epochs.values():
        assert [len(batch) for batch in batches] == [4, 4, 4, 2]
        assert sorted(row.tobytes() for batch in batches for row in batch) == expected(paths)
    assert len({np.concatenate(batches).tobytes() for batches in epochs.values()}) == 4  # (0, 1) is not (1, 0)
    torch.manual_seed(2)
    np.random.seed(2)
    other = load_images("folder", tmp_path / "in", 16, cache=cache)
    for start in (3, 1, 0, 4):
        assert same(epoch_of(other, 4, 1, 1, start), epochs[1, 1][start:])
    assert np.array_equal(np.concatenate(epoch_of(other, 5, 1, 1)), np.concatenate(epochs[1, 1]))


def test_a_batch_of_broken_pictures_does_not_shift_those_after_it(tmp_path):
    paths = write(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    paths[2].write_bytes(b"")
    images = load_images("folder", tmp_path / "in", 16, cache="none")
    epoch = epoch_of(images, batch_size=1)
    assert [same(epoch_of(images, 1, start=k), epoch[k:]) for k in range(5)] == [True] * 5


# The data sets


def test_a_cartoon_depends_on_its_index_alone():
    code = "from support.cartoon import draw_cartoon as d; print(*(d(i, 32).tobytes().hex() for i in (5, 2)))"
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.split() == [draw_cartoon(i, 32).tobytes().hex() for i in (5, 2)]


def test_cartoons_differ_and_are_the_same_at_every_size():
    small = [np.asarray(draw_cartoon(i, 32)).astype(int) for i in range(12)]
    large = [np.asarray(draw_cartoon(i, 128).reduce(4)).astype(int) for i in range(12)]
    distance = np.array([[np.abs(a - b).mean() for b in large] for a in small])
    assert (distance.argmin(1) == range(12)).all()
    assert distance.diagonal().max() < 5 < np.sort(distance, 1)[:, 1].min()
    assert {a.shape for a in small} == {(32, 32, 3)}
    assert min(a.std() for a in small) > 20  # no blank ones


@pytest.mark.parametrize("dataset", ["cartoon", "fake"])
def test_made_pictures_are_the_same_from_the_cache(dataset, monkeypatch):
    monkeypatch.setattr(cartoon.Cartoons, "__len__", lambda _: 30)  # 10,000 take a while
    streamed, cached = (load_images(dataset, None, 16, cache=cache) for cache in ("none", None))
    assert same(epoch_of(cached, 16), epoch_of(streamed, 16))
    assert len(set(contents(cached))) == len(cached) == {"cartoon": 30, "fake": 1000}[dataset]


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "lfw"])
@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.bmp", "C.PNG", "d.webp"],
        ["cat/a.png", "dog/a.png"],
        ["x/y/z/a.png", "x/b.png", "c.png"],
        ["ü ber/日本 語.png", " a b .png", "%s{}.png", "\udcff.png" if sys.platform == "linux" else "x.png"],
    ],
)
def test_a_folder_gives_every_picture_below_it(dataset, names, tmp_path):
    root = tmp_path / "in"
    paths = write(root, *names)
    (root / "empty" / "deeper").mkdir(parents=True)
    for junk in (".hidden.png", "x/._a.png", "notes.txt", "png"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_text("not a picture")
    (paths[0].parent / "loop").symlink_to(root)
    paths += write(tmp_path / "outside", "linked.png")
    (root / "link").symlink_to(tmp_path / "outside")
    images = load_images(dataset, root, 16, nc=1)
    assert contents(images) == expected(paths, nc=1)
    assert images.skipped == []


def test_a_run_folder_is_not_learned_from(tmp_path):
    paths = write(tmp_path, "in/a.png")
    write(tmp_path, "in/out/fake_samples_epoch_000.png", "in/out/deeper/b.png")
    for name in ("args.json", "log.csv", "checkpoint.pth"):
        (tmp_path / "in" / "out" / name).touch()
    assert contents(load_images("folder", tmp_path / "in", 16)) == expected(paths)


class Deadly(Source):
    """A picture that ends the process that decodes it, as the system does where memory is short."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)

    def identity(self):
        return 0


def test_a_killed_worker_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "deadly", lambda *_: Deadly())
    for cache in ("none", tmp_path / "kept"):
        with pytest.raises(ChildProcessError, match="decoding pictures failed"):
            contents(load_images("deadly", image_size=16, cache=cache, workers=1))
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    write(tmp_path, "in/a.png")
    refused("--cache", tmp_path / "file", dataset="folder", dataroot=tmp_path / "in", cache=tmp_path / "file")


def test_a_link_to_nothing_is_skipped_like_a_broken_picture(tmp_path):
    paths = write(tmp_path, "in/a.png", "in/b.png")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    for cache in ("none", None):
        images = load_images("folder", tmp_path / "in", 16, cache=cache)
        assert contents(images) == expected(paths)
        assert ["gone.png" in report for report in images.skipped] == [True]


@pytest.mark.parametrize("cache", ["none", None])
def test_folders_that_cannot_be_listed_are_reported(cache, tmp_path, monkeypatch):
    paths = write(tmp_path / "in", "a.png", "no/b.png", "never/c.png")
    scandir = os.scandir

    def lock_file(path):  # chmod does not stop root
        if Path(path).name in ("no", "never"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", lock_file)
    images = load_images("folder", tmp_path / "in", 16, cache=cache)
    assert contents(images) == expected(paths[:1])
    assert [Path(report.split(" (")[0]).name for report in sorted(images.unlisted)] == ["never", "no"]


@pytest.mark.parametrize("place", ["celeba/img_align_celeba", "img_align_celeba", "."])
@pytest.mark.parametrize("doubled", ["", "img_align_celeba"])
@pytest.mark.parametrize("dataroot", ["in", None])
def test_celeba_is_found_in_every_layout(dataroot, place, doubled):
    paths = write(Path(dataroot or "data") / place / doubled, "000001.jpg", "000002.jpg", "000003.jpg")
    assert contents(load_images("celeba", dataroot, 16)) == expected(paths)


@pytest.mark.parametrize("inside", ["img_align_celeba/", ""])
@pytest.mark.parametrize("place", ["celeba", "."])
def test_celeba_is_unpacked_once(place, inside, tmp_path):
    paths = write(tmp_path / "loose", "000001.jpg", "000002.jpg")
    root = tmp_path / "in"
    (root / place).mkdir(parents=True)
    with zipfile.ZipFile(root / place / "img_align_celeba.zip", "w") as archive:
        for path in paths:
            archive.write(path, inside + path.name)
    assert contents(load_images("celeba", root, 16)) == expected(paths)
    (root / place / "img_align_celeba.zip").write_bytes(b"gone")
    assert contents(load_images("celeba", root, 20)) == expected(paths, 20)


def test_no_name_in_an_archive_leads_out_of_its_folder(tmp_path):
    (path,) = write(tmp_path, "1.jpg")
    root = tmp_path / "deep" / "er" / "in"
    root.mkdir(parents=True)
    hostile = ["../../evil1.jpg", f"{tmp_path}/evil2.jpg", "..\\..\\evil3.jpg", "a/../../../evil4.jpg", "/evil5.jpg"]
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
        for name in [*hostile, "../evil.py"]:
            archive.writestr(name, path.read_bytes())
    assert set(contents(load_images("celeba", root, 16, cache="none"))) == set(expected([path]))
    unpacked = root / "img_align_celeba"
    assert {p for p in tmp_path.rglob("*evil*") if p.parent != unpacked} == set()
    assert not Path("/evil5.jpg").exists()
    assert {p.suffix for p in unpacked.iterdir()} == {".jpg"}


@pytest.mark.parametrize("damage", ["cut", "body", "encrypted", "unknown method", "empty", "page", "no pictures"])
def test_a_damaged_archive_is_refused_and_nothing_is_left(damage, tmp_path):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt" if damage == "no pictures" else "1.jpg", bytes(range(256)) * 9)
    whole = file.getvalue()
    body, entry = 30 + len("1.jpg"), whole.index(b"PK\1\2")  # the packed file, its entry in the central directory
    content = {
        "cut": whole[:-30],
        "body": whole[:body] + b"\xff" * 40 + whole[body + 40 :],
        "encrypted": whole[: entry + 8] + b"\1" + whole[entry + 9 :],
        "unknown method": whole[: entry + 10] + b"\x63" + whole[entry + 11 :],
        "empty": b"",
        "page": b"<html>Quota exceeded</html>",
        "no pictures": whole,
    }
    root = tmp_path / "in"
    root.mkdir()
    (root / "img_align_celeba.zip").write_bytes(content[damage])
    refused(root / "img_align_celeba", dataset="celeba", dataroot=root)
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["img_align_celeba.zip"]


def test_celeba_that_cannot_be_downloaded_says_what_to_do(tmp_path):
    steps = ["img_align_celeba.zip", "by hand", "https://", "no network"]
    refused(tmp_path / "in", *steps, dataset="celeba", dataroot=tmp_path / "in")


def test_celeba_is_downloaded_where_it_is_not_there(tmp_path, monkeypatch):
    place = "celeba/img_align_celeba"  # where torchvision puts it
    monkeypatch.setattr(datasets, "CelebA", lambda root, *_, **__: write(Path(root) / place, "1.jpg"))
    images = load_images("celeba", tmp_path / "in", 16)
    assert contents(images) == expected((tmp_path / "in").rglob("*.jpg"))


@pytest.mark.parametrize("nc", [1, 3])
def test_mnist_is_read_in_torchvisions_layout(nc, tmp_path):
    raw = tmp_path / "in" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for part, count in (("train", 6), ("t10k", 3)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels[:count].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count))
    images = load_images("mnist", tmp_path / "in", 28, nc=nc)
    assert contents(images) == sorted(np.stack([row] * nc).tobytes() for row in pixels[:6])


def test_cifar10_is_read_in_torchvisions_layout(tmp_path, monkeypatch):
    folder = tmp_path / "in" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    batch = pickle.dumps({"data": pixels.reshape(7, -1), "labels": [0] * 7})
    meta = pickle.dumps({"label_names": ["airplane"]})
    (folder / "data_batch_1").write_bytes(batch)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    assert contents(load_images("cifar10", tmp_path / "in", 32)) == sorted(row.tobytes() for row in pixels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", None])
def test_lsun_is_read_from_its_data_bases(cache, workers, tmp_path):
    root, rooms = tmp_path / "in", [noise(20, 17, seed=i) for i in range(9)]
    lmdb_of(root / "bedroom_train_lmdb", rooms[:6])
    lmdb_of(root / "church_outdoor_train_lmdb", rooms[6:])
    wanted = [torchvisions(image, 16).tobytes() for image in rooms]
    options = {"image_size": 16, "cache": cache, "workers": workers}
    both = load_images("lsun", root, classes="bedroom,church_outdoor_train", **options)
    assert contents(both) == sorted(wanted)
    assert contents(load_images("lsun", root, **options)) == sorted(wanted[:6])  # one of them is in use already
    assert contents(load_images("lsun", root / "church_outdoor_train_lmdb", **options)) == sorted(wanted[6:])
    assert contents(both) == sorted(wanted)
    assert list(Path().iterdir()) == []
    assert [path.name for path in root.rglob("*.*")] == ["data.mdb"] * 2


# What cannot be had


def test_lsun_names_the_classes_that_are_there(tmp_path):
    lmdb_of(tmp_path / "in" / "bridge_train_lmdb", [noise()])
    there = ["bedroom_train_lmdb", tmp_path / "in", "bridge"]
    refused(*there, dataset="lsun", dataroot=tmp_path / "in", classes="bridge,bedroom")


@pytest.mark.parametrize("content", [None, b"<html>", b""])
def test_a_data_base_without_pictures_is_refused(content, tmp_path):
    folder = tmp_path / "bedroom_train_lmdb"
    lmdb_of(folder, [])  # training on it would do nothing, in silence
    if content is not None:
        (folder / "data.mdb").write_bytes(content)
    refused(folder, dataset="lsun", dataroot=tmp_path)


def test_half_a_data_base_is_refused(tmp_path):
    folder = tmp_path / "bedroom_train_lmdb"
    lmdb_of(folder, [noise(64, 64, seed=i) for i in range(20)])
    os.truncate(folder / "data.mdb", (folder / "data.mdb").stat().st_size // 2)
    options = {"dataset": "lsun", "dataroot": tmp_path}
    # In a process of its own: to read memory beyond the end of the file ends the process (SIGBUS).
    process = multiprocessing.get_context("fork").Process(target=refused, args=[folder], kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "lfw"])
def test_a_folder_that_will_not_do_is_refused(dataset, tmp_path):
    refused("--dataroot", dataset=dataset)
    refused(tmp_path / "missing", "no such folder", dataset=dataset, dataroot=tmp_path / "missing")
    (tmp_path / "in" / "class").mkdir(parents=True)
    (tmp_path / "in" / "class" / "notes.txt").write_text("no picture")
    refused(tmp_path / "in", "*.jpg", "*.png", dataset=dataset, dataroot=tmp_path / "in")


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_what_cannot_be_downloaded_is_refused(dataset, tmp_path):
    refused(tmp_path / "in", dataset.upper(), dataset=dataset, dataroot=tmp_path / "in")


def write_broken(root):
    """Write six files that are no pictures; return their names."""
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
def test_broken_pictures_are_skipped_by_name_up_to_half(cache, workers, tmp_path):
    root = tmp_path / "in"
    paths = write(root, *(f"{i}.png" for i in range(6)))  # 12 in all: the count of the cached loses a digit
    names = write_broken(root)
    images = load_images("folder", root, 16, cache=cache, workers=workers)
    assert contents(images) == expected(paths)
    assert contents(images) == expected(paths)
    assert [sum(name in report for report in images.skipped) for name in names] == [1] * 6
    assert len(images.skipped) == 6
    assert "196000000" in next(report for report in images.skipped if "bomb.png" in report)  # never decoded
    if cache is None:
        assert len(images) == 6
    before = set((tmp_path / "cache").rglob("[!.]*"))
    (root / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"7 of 12 .*(half|flipped|empty|text|bomb|0)\."):
        contents(load_images("folder", root, 16, cache=cache, workers=workers))
    assert set((tmp_path / "cache").rglob("[!.]*")) == before  # nothing half done is left
    assert list((tmp_path / "cache").rglob("*.part")) == []


SPAWN = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import numpy
    from data import load_images
    for dataset, cache in zip(["folder", "lsun"], sys.argv[2:]):
        images = load_images(dataset, dataset, 16, cache=cache, workers=2)
        numpy.save(dataset, numpy.concatenate([*images.batches(4, seed=1, epoch=0)]))
"""


# Two at a time: every worker takes seconds to import torch.
@pytest.mark.parametrize("caches", [("there", "none"), pytest.param(("none", "there"), marks=pytest.mark.slow)])
def test_workers_can_be_spawned(caches):
    """As they are on macOS and Windows: what goes to them must be picklable, and an open data base is not."""
    write("folder", *(f"{i}.png" for i in range(7)))
    lmdb_of(Path("lsun/bedroom_train_lmdb"), [noise(seed=i) for i in range(7)])
    Path("script.py").write_text(SPAWN)
    done = subprocess.run([sys.executable, "script.py", ROOT, *caches], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for dataset in ("folder", "lsun"):
        assert np.array_equal(np.load(f"{dataset}.npy"), np.concatenate(epoch_of(load_images(dataset, dataset, 16))))


@pytest.mark.parametrize("start", [0, 2, 6])
def test_pictures_kept_on_a_device_come_in_the_same_order(start):
    rows = np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), np.uint8)
    on_disk, kept, too_large = (data.PreparedImages(rows, [], []) for _ in range(3))
    kept.keep_on(torch.device("cpu"), 3 * rows.nbytes + 3)
    too_large.keep_on(torch.device("cpu"), 3 * rows.nbytes)
    assert isinstance(kept.rows, torch.Tensor)
    assert too_large.rows is rows
    expected = list(on_disk.batches(8, 1, 2, start))
    assert sum(map(len, expected)) == 50 - 8 * start
    for ours, theirs in zip(kept.batches(8, 1, 2, start), expected, strict=True):
        assert torch.equal(ours, theirs)
