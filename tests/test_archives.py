"""Images in archives: the same as in a folder, read without unpacking; and archives that are refused."""

import gzip
import io
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from helpers import (
    FOLDER,
    assert_cannot_load,
    assert_refused,
    assert_same,
    assert_same_run,
    checkpoint,
    contents,
    epoch_of,
    expected_contents,
    files,
    noise,
    run_dcgan,
    write_images,
)
from PIL import Image

from data import load_images
from support import archives, seekable_gzip
from support.archives import ZipSource
from support.seekable_gzip import SeekableGzip
from support.tar_archives import TarSource

pytestmark = pytest.mark.usefixtures("isolated")
KINDS = ["a.zip", "stored.ZIP", "a.tar", "a.tar.gz", "a.tgz"]
OPTIONS = [*FOLDER, "--workers", 0, "--batchSize", 4, "--manualSeed", 3]


def pack(folder, archive, seed=0):
    """Write all files of `folder` into an archive, in an order that depends on the seed; return its path."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    random.Random(seed).shuffle(names)
    archive.parent.mkdir(exist_ok=True)
    if archive.suffix.lower() == ".zip":
        method = zipfile.ZIP_STORED if archive.name.startswith("stored") else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(archive, "w", method) as packed:
            for name in names:
                packed.write(folder / name, name)
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for name in names:
                packed.add(folder / name, name, recursive=False)
    return archive


def png(seed):
    noise(seed=seed).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pixels(seed):
    return expected_contents([io.BytesIO(png(seed))])


def tar_of(path, *members):
    """Write a tar archive of (name, content, or a TarInfo's type and the target of a link); return its path."""
    with tarfile.open(path, "w") as packed:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
                packed.addfile(info)
            else:
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return path


def zip_of(path, *members):
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members:
            packed.writestr(name, content)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of images of many kinds, with files that are passed over and one that cannot be read."""
    root = tmp_path / "in"
    write_images(root, *(f"{i}.png" for i in range(20)), "b/c/d.jpg", "b/a.webp", "ü ber/日本 語.bmp", "Z.gif")
    noise(mode="RGBA").save(root / "b" / "transparent.png")
    noise(mode="L").save(root / "grey.png")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(root / "deep.png")
    (root / "damaged.png").write_bytes(png(1)[:300])
    for name in ("notes.txt", ".hidden.png", "__MACOSX/._a.png", ".thumbnails/e.png", "b/f.heic"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(png(2))
    return root


# The same images as in a folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_gives_the_array_that_its_folder_gives(folder, kind, tmp_path):
    expected = load_images("folder", folder, 16, cache=tmp_path / "expected")
    assert len(expected) == 27
    for seed in (0, 1):  # whatever the order of the files in the archive
        archive = pack(folder, tmp_path / f"packed{seed}" / kind, seed)
        images = load_images("folder", archive, 16, cache=tmp_path / f"cache{seed}")
        assert np.array_equal(images.array, expected.array)
        assert (images.skipped, images.notes) == (expected.skipped, expected.notes)
        assert images.fingerprints == expected.fingerprints
        assert files(archive.parent) == [archive]


@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 0) for kind in KINDS), ("a.zip", 2), ("a.tar", 2), ("a.tgz", 2)]
)
def test_without_a_cache_it_gives_the_same_batches(folder, kind, workers, tmp_path):
    expected = load_images("folder", folder, 16, cache="none")
    images = load_images("folder", pack(folder, tmp_path / "packed" / kind), 16, cache="none", workers=workers)
    assert_same(epoch_of(images, 5, 7, 3, start=2), epoch_of(expected, 5, 7, 3, start=2))
    assert images.skipped == expected.skipped


def test_an_archive_of_a_prepared_folder_is_not_prepared_again(folder, tmp_path, monkeypatch):
    first = load_images("folder", folder, 16)
    monkeypatch.setattr("support.decoding.prepare", lambda *_: pytest.fail("an image is decoded"))
    for kind in KINDS:
        assert load_images("folder", pack(folder, tmp_path / "packed" / kind), 16).path == first.path
    moved = (tmp_path / "packed").rename(tmp_path / "moved")
    os.utime(moved / "a.zip", (1, 1))
    assert load_images("folder", moved / "a.zip", 16).path == first.path


@pytest.mark.parametrize(("kind", "source"), [("a.zip", ZipSource), ("a.tar", TarSource), ("a.tar.gz", TarSource)])
def test_another_process_reads_it_as_well(folder, kind, source, tmp_path):
    """Where processes are not forks, they get a copy without what is open."""
    here = source(pack(folder, tmp_path / "packed" / kind))
    expected = [here.content(i) for i in range(len(here))]
    assert expected == [(folder / name).read_bytes() for name in here.names]
    there = pickle.loads(pickle.dumps(here))
    for i in (20, 3, 3, 27, 0):
        assert there.content(i) == expected[i]
        assert there.digest(i) == here.digest(i)
    here.close(), there.close()


# Names and links in archives


def test_names_lead_out_of_no_archive(tmp_path):
    names = ["../../up.png", "/etc/root.png", "./a//b/../dot.png", "C/back.png"]
    members = [(name, png(i)) for i, name in enumerate(names)]
    expected = [
        os.path.join(*parts) for parts in (["C", "back.png"], ["a", "dot.png"], ["etc", "root.png"], ["up.png"])
    ]
    tar = tar_of(tmp_path / "a.tar", *members)
    zipped = zip_of(tmp_path / "a.zip", *members[:3], ("C\\back.png", png(3)))
    for source in (TarSource(tar), ZipSource(zipped)):
        assert source.names == expected
        assert [source.content(i) for i in range(4)] == [png(3), png(2), png(1), png(0)]
        source.close()
    assert files(tmp_path) == [tar, zipped]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_files_with_one_name_the_last_counts(tmp_path):
    """As if they were unpacked: tar -r appends a file again."""
    members = [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))]
    for archive in (tar_of(tmp_path / "a.tar", *members), zip_of(tmp_path / "a.zip", *members)):
        assert contents(load_images("folder", archive, 16, cache="none")) == sorted(pixels(2) + pixels(3))


def test_links_in_a_tar_archive_are_followed_inside_it(tmp_path):
    LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
    members = [("x/a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))]
    members += [("y/link.png", LINK, "../x/a.png"), ("hard.png", HARD, "b.png"), ("second.png", LINK, "y/link.png")]
    members += [("loop.png", LINK, "loop.png"), ("out.png", LINK, "/etc/passwd"), ("pipe.png", tarfile.FIFOTYPE, "")]
    members += [("c.png", LINK, "b.png"), ("c.png", png(4))]  # the last is no link
    images = load_images("folder", tar_of(tmp_path / "a.tar", *members), 16)
    assert contents(images) == sorted(pixels(1) * 3 + pixels(2) * 2 + pixels(4))
    assert images.skipped == [
        "loop.png (not a plain file)",
        "out.png (a link to no file of the archive)",
        "pipe.png (not a plain file)",
    ]


def test_links_in_a_zip_archive_are_skipped(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    archive = zip_of(tmp_path / "a.zip", ("a.png", png(1)), (link, "a.png"))
    images = load_images("folder", archive, 16)
    assert (contents(images), images.skipped) == (pixels(1), ["link.png (a link)"])


def test_run_folders_in_an_archive_are_left_out(tmp_path):
    run = [(f"run/{name}", b"") for name in ("args.json", "log.csv", "checkpoint.pth")]
    archive = zip_of(tmp_path / "a.zip", ("a.png", png(1)), ("run/b.png", png(2)), *run)
    images = load_images("folder", archive, 16)
    assert (contents(images), list(images.notes)) == (pixels(1), ["passed over 1 folder: run"])
    archive = zip_of(tmp_path / "b.zip", *((name.removeprefix("run/"), content) for name, content in run))
    assert_cannot_load("is a run folder", dataset="folder", dataroot=archive)


# Images that cannot be read


@pytest.mark.parametrize("kind", ["stored.zip", "a.tar"])
def test_damaged_files_in_an_archive_are_skipped(kind, tmp_path):
    paths = write_images(tmp_path / "in", "a.bmp", "b.bmp", "c.bmp")
    archive = pack(tmp_path / "in", tmp_path / kind)
    content = archive.read_bytes()
    start = content.index(paths[1].read_bytes())
    archive.write_bytes(content[:start] + b"XX" + content[start + 2 :])
    images = load_images("folder", archive, 16)
    assert contents(images) == expected_contents([paths[0], paths[2]])
    assert images.skipped[0].startswith("b.bmp (")
    assert ("Bad CRC-32" in images.skipped[0]) == (kind == "stored.zip")


def test_a_damaged_file_is_reported_once_in_a_run_without_a_cache(tmp_path):
    """Pillow's own text names an address in memory, which differs each time."""
    members = [*((f"{i}.png", png(i)) for i in range(4)), ("x.png", b"no image")]
    images = load_images("folder", zip_of(tmp_path / "a.zip", *members), 16, cache="none")
    for epoch in range(4):
        list(images.batches(2, seed=1, epoch=epoch))
    assert images.skipped == ["x.png (cannot identify image file)"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_expand_too_far_are_skipped(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    paths = write_images(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "in" / "large.bmp").write_bytes(bytes(2**20 + 1))
    images = load_images("folder", pack(tmp_path / "in", tmp_path / kind), 16)
    assert contents(images) == expected_contents(paths)
    assert images.skipped == ["large.bmp (more than 1 MB)"]


# Archives that are refused


def broken(archive, change):
    content = bytearray(archive.read_bytes())
    archive.write_bytes(change(content))
    return archive


def cut(content):
    return content[: len(content) // 2]


def damage_a_header(content):
    content[content.index(b"1.png") + 120] ^= 1
    return content


def give_a_negative_size(content):
    """In the header of the first file: it leads back to itself."""
    content[124:136] = b"\xff" * 10 + struct.pack(">h", -512)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return content


def flip(content):
    content[len(content) // 2] ^= 1
    return content


def set_everywhere(content, value, offset):
    """Change a field of all headers of a zip archive, those before the files and those at its end."""
    for signature, place in ((b"PK\x03\x04", 6 + offset), (b"PK\x01\x02", 8 + offset)):
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            content[start + place] |= value
    return content


REFUSED = [
    ("a.zip", cut, "cannot be read (File is not a zip file); download it again, or unpack it and name the folder"),
    ("a.tar", cut, "cannot be read ("),
    ("a.tar", damage_a_header, "cannot be read ("),
    ("a.tar", give_a_negative_size, "cannot be read ("),
    ("a.tar.gz", cut, "cut off"),
    ("a.tar.gz", flip, "cannot be read ("),
    ("a.tar.gz", lambda content: content[:-4], "cut off"),
    ("a.zip", lambda _: b"<!DOCTYPE html>", "File is not a zip file"),
    ("a.tar", lambda _: b"<!DOCTYPE html>", "cannot be read ("),
    ("a.tar", lambda _: b"", "empty file"),
    ("a.zip", lambda content: set_everywhere(content, 1, 0), "has a password; unpack it and name the folder"),
    ("stored.zip", lambda content: set_everywhere(content, 9, 2), "by a method that is not read here (deflate64)"),
]


@pytest.mark.parametrize(("kind", "change", "words"), REFUSED)
def test_archives_that_cannot_be_read_are_refused(kind, change, words, tmp_path):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    archive = broken(pack(tmp_path / "in", tmp_path / kind), change)
    assert_cannot_load(f"--dataroot {archive}", words, dataset="folder", dataroot=archive)
    assert not (tmp_path / "cache").exists()


def test_a_tar_archive_is_read_to_its_end_or_refused(tmp_path):
    """Where a header is damaged, Python's tarfile ends as if the archive did."""
    members = [(f"{i}.png", png(i)) for i in range(5)]
    damages = [(lambda content: content[:3000], "(unexpected end of data)")]
    damages += [(damage_a_header, "(the header of a file is damaged)")]
    for change, word in damages:
        archive = broken(tar_of(tmp_path / "a.tar", *members), change)
        assert_cannot_load(f"a.tar: the archive cannot be read {word}", dataset="folder", dataroot=archive)
    archive = tar_of(tmp_path / "a.tar", *members)
    end = -(-len(archive.read_bytes().rstrip(b"\0")) // 512) * 512
    assert len(TarSource(broken(archive, lambda content: content[:end]))) == 5  # some programs write no end


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_archives_that_expand_far_more_than_images_do_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(seekable_gzip, "ALWAYS_ALLOWED", 2**20)
    write_images(tmp_path / "in", "a.png")
    (tmp_path / "in" / "zeros.bmp").write_bytes(bytes(5 * 2**20))
    archive = pack(tmp_path / "in", tmp_path / kind)
    assert_cannot_load("expands to more than 200 times its size", dataset="folder", dataroot=archive)
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(30)))  # 50 KB, with which the zeros are no bomb
    assert len(load_images("folder", pack(tmp_path / "in", tmp_path / kind), 16)) == 31


def test_an_archive_without_images_is_refused(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("a.txt", b""), ("inner.zip", b""), ("x/b.heic", b""))
    words = [
        f"--dataroot {archive}: no images",
        "passed over 1 .txt, 1 .zip, 1 .heic); convert the .heic files to .jpg",
    ]
    assert_cannot_load(*words, dataset="folder", dataroot=archive)


def test_other_files_and_missing_ones_are_refused(tmp_path):
    (photo,) = write_images(tmp_path, "photo.jpg")
    words = "is a file; --dataroot takes a folder of images, an archive (.zip, .tar, .tar.gz) or an array (.npy, .npz)"
    assert_cannot_load(f"--dataroot {photo} {words}", dataset="folder", dataroot=photo)
    for name in ("a.zip", "a.tar.gz", "a.npy"):
        assert_cannot_load(f"{name}: there is no such file", dataset="folder", dataroot=tmp_path / name)
    paths = write_images(tmp_path / "folder.zip", "a.png")
    assert contents(load_images("folder", tmp_path / "folder.zip", 16)) == expected_contents(paths)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.zip")  # opening it would wait for ever
    assert_cannot_load("a.zip is a file; ", dataset="folder", dataroot=tmp_path / "a.zip")


# gzip


@pytest.mark.parametrize("parts", [1, 3])
def test_a_gzip_file_is_read_from_any_position(parts, tmp_path):
    draw = np.random.default_rng(0)
    expected = draw.bytes(4_000_000) + bytes(3_000_000) + draw.bytes(1_000_000)
    size = -(-len(expected) // parts)
    pieces = [gzip.compress(expected[i : i + size], 1) for i in range(0, len(expected), size)]
    (tmp_path / "a.gz").write_bytes(b"".join(pieces) + bytes(1000))
    fresh, known = SeekableGzip(tmp_path / "a.gz"), SeekableGzip(tmp_path / "a.gz")
    assert known.read(10**9) == expected
    assert (known.read(1), known.tell()) == (b"", len(expected))
    assert len(known.points) > 10
    for stream in (fresh, known, SeekableGzip(tmp_path / "a.gz", known.points)):
        for position in draw.integers(len(expected) + 10, size=100):
            stream.seek(position)
            assert stream.read(5000) == expected[position : position + 5000]
        stream.close()


def test_the_points_of_a_gzip_file_are_few_however_far_it_expands(tmp_path, monkeypatch):
    monkeypatch.setattr(seekable_gzip, "POINTS", 10)
    expected = bytes(20_000_000) + np.random.default_rng(0).bytes(1000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(expected, 1))
    stream = SeekableGzip(tmp_path / "a.gz")
    assert stream.read(10**9) == expected
    assert 4 < len(stream.points) <= 10
    assert max(len(point.state.unconsumed_tail) for point in stream.points) <= seekable_gzip.INPUT
    for position in (0, 7_777_777, 20_000_500):
        stream.seek(position)
        assert stream.read(100) == expected[position : position + 100]
    stream.close()


def test_the_checksum_of_a_gzip_file_is_verified(tmp_path):
    content = bytearray(gzip.compress(bytes(100)))
    content[-8] ^= 1
    (tmp_path / "a.gz").write_bytes(content)
    stream = SeekableGzip(tmp_path / "a.gz")
    with pytest.raises(zlib.error, match="incorrect data check"):
        stream.read(1000)
    stream.close()


# In a run


@pytest.mark.parametrize(("kind", "cache"), [("a.zip", []), ("a.tar.gz", ["--cache", "none"])])
def test_a_run_resumes_with_the_archive_moved_or_unpacked_but_not_changed(kind, cache, tmp_path, capsys):
    write_images(tmp_path / "in", *(f"{i}.bmp" for i in range(8)))
    archive = pack(tmp_path / "in", tmp_path / kind)
    options = [*OPTIONS, *cache, "--dataroot"]
    assert run_dcgan(tmp_path / "out", *options, archive, "--niter", 1) == 0
    whole = shutil.copytree(tmp_path / "out", tmp_path / "whole")
    assert run_dcgan(whole, "--resume", "--niter", 2) == 0
    moved = archive.rename(tmp_path / f"moved.{kind}")
    for dataroot in (moved, tmp_path / "in"):
        run = shutil.copytree(tmp_path / "out", tmp_path / f"run-{dataroot.name}")
        assert run_dcgan(run, "--resume", "--niter", 2, "--dataroot", dataroot) == 0
        assert_same_run(run, whole)
        assert checkpoint(run)["options"]["dataroot"] == str(dataroot)
    (tmp_path / "in" / "3.bmp").rename(tmp_path / "in" / "33.bmp")
    pack(tmp_path / "in", archive)
    capsys.readouterr()
    words = "the number, names or sizes of the images have changed; restore them, or start a new run"
    assert_refused(lambda: run_dcgan(tmp_path / "out", "--resume"), capsys, words)
    archive.unlink()
    assert_refused(lambda: run_dcgan(tmp_path / "out", "--resume"), capsys, f"--dataroot {archive}: there is no such")


def test_a_slash_after_the_name_of_an_archive_does_no_harm(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("a.png", png(1)))
    assert contents(load_images("folder", f"{archive}/", 16)) == pixels(1)
    assert_cannot_load("a.zip is a file; name the folder that holds it", dataset="mnist", dataroot=archive)
