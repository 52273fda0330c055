"""Faults caused for real: processes killed, disks filled, files damaged or made to do harm. What must survive, does."""

import contextlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import (
    RUN,
    SMALL,
    assert_same_run,
    checkpoint,
    files,
    finish,
    hashes,
    here,
    log_rows,
    start,
    wait_for,
)
from test_data import write
from test_models import randomised

import dcgan
from data import load_images
from models import Generator, load_generator
from support.errors import UserError
from support.files import write_atomically
from support.run_folder import RunFolder
from support.weights import read_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="causes faults as Linux has them")
ROOT = Path(__file__).parents[1]
FOLDER = SMALL.rerank_and_world_size("fake", "folder").split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def unbroken(base):
    """The folder of a run that was never stopped; tests leave it as it is."""
    finish(start(base / "unbroken", "dcgan.py", *RUN))
    return base / "unbroken" / "out"


def children(pid):
    """Return the process ids of a process's children."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended; its children are another's now
            found += map(int, path.read_text().split())
    return sorted(found)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def streaming(folder, count=64, cache="none"):
    """Return the options of a run in `folder` on `count` pictures, which two processes decode."""
    write(folder.parent / "photos", *(f"{i:03d}.png" for i in range(count)))
    options = f"--dataroot ../photos --batchSize 8 --manualSeed 3 --cache {cache} --workers 2 --log-every 4"
    return [*FOLDER, *options.split()]


# Saving


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", lambda file: file.write(b"abc"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_what_does_not_read_as_it_was_written_takes_no_files_rank_and_world_size(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"X", 1))  # a disk that loses a byte
    with pytest.raises(OSError, match="a could not be written .it does not read"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == {"a": b"old"}


def test_every_flipped_byte_of_a_checkpoint_is_found_or_does_no_harm(unbroken, tmp_path):
    content = bytearray((unbroken / "checkpoint.pth").read_bytes())
    whole, path = read_file(unbroken / "checkpoint.pth"), tmp_path / "flipped.pth"
    found, places = 0, random.Random(0).sample(range(len(content)), 300)
    for place in [*places, *range(64), *range(len(content) - 64, len(content))]:
        content[place] ^= 0xFF
        path.write_bytes(content)
        content[place] ^= 0xFF
        try:
            state = read_file(path)
        except UserError:
            found += 1
        else:  # a byte of padding, or of what no reader looks at
            assert set(state) == set(whole)
            for name in ("netG", "netD", "netG_ema"):
                assert all(torch.equal(state[name][key], t) for key, t in whole[name].items())
    assert found > 200


def test_a_run_goes_on_from_the_save_before_a_flipped_byte(base, unbroken, capsys):
    folder = shutil.copytree(unbroken, base / "flipped" / "out")
    content = bytearray((folder / "checkpoint.pth").read_bytes())
    with zipfile.ZipFile(folder / "checkpoint.pth") as archive:
        tensor = max(archive.infolist(), key=lambda part: part.file_size)
    content[tensor.header_offset + tensor.file_size // 2] ^= 1  # in the middle of the largest tensor
    (folder / "checkpoint.pth").write_bytes(content)
    assert here(folder, "--resume") == 0
    assert "is not what was written" in capsys.readouterr().err
    assert_same_run(folder, unbroken)


def test_a_full_disk_leaves_every_file_whole(base, unbroken):
    """In a file system of 400 KB, which a run fills at its first saves."""
    folder = base / "full"
    folder.mkdir()
    train = [
        sys.executable,
        str(ROOT / "dcgan.py"),
        *RUN,
        "--cache",
        str(base / "cache" / "dcgan"),
        "--outf",
        "small/out",
    ]
    script = (
        "mkdir small && mount -t tmpfs -o size=400k tmpfs small || exit 77\n"
        '"$@" 2>errors; echo $? >code; cp -r small/out kept; umount small'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *train], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode == 77 or not (folder / "code").exists():
        pytest.skip("may not mount a file system here")
    errors = (folder / "errors").read_text()
    assert (folder / "code").read_text() == "1\n"
    assert errors.splitlines()[-1].endswith("(No space left on device); the files saved before it are whole")
    assert "Traceback" not in errors
    assert list((folder / "kept").glob(".*.part")) == []
    for path in (folder / "kept").glob("*.pth"):
        read_file(path)
    for path in (folder / "kept").glob("*.png"):
        Image.open(path).load()
    shutil.move(folder / "kept", folder / "out")
    finish(start(folder, "dcgan.py", *RUN, "--resume"))
    assert_same_run(folder / "out", unbroken)


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path):
    """In a file system that is mounted read-only, which stops root as well."""
    script = 'mkdir fixed && mount -t tmpfs -o ro tmpfs fixed || exit 77\n"$@" 2>errors; echo $? >code'
    command = [sys.executable, str(ROOT / "dcgan.py"), *RUN, "--outf", "fixed/out", "--cache", "cache"]
    subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command], cwd=tmp_path)
    if not (tmp_path / "code").exists():
        pytest.skip("may not mount a file system here")
    assert (tmp_path / "code").read_text() == "2\n"
    expected = "dcgan.py: --outf fixed/out: fixed is not a folder that can be written to; choose another --outf\n"
    assert (tmp_path / "errors").read_text().rerank_and_world_size(f"{tmp_path}/", "") == expected
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("limit", "where"), [(1_000, "--cache"), (40_000, "could not be written")])
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path, limit, where):
    """First of the prepared pictures; then, when they are there, of the first grid."""
    if limit > 1_000:
        finish(start(tmp_path, "dcgan.py", *RUN, "--dry-run"))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path.parent / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "dcgan.py", *RUN, *(["--imageSize", "20"] if limit == 1_000 else [])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    assert where in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob(".*.part")) == list((tmp_path.parent / "cache").rglob(".*.part")) == []


def test_a_new_run_leaves_other_files_in_its_folder_alone(tmp_path):
    others = {name: name.encode() for name in ("netG.pth", "network.pth", "netG_mine.pth", "skipped.txt", "a.png")}
    for name, content in others.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    assert here(tmp_path / "out", *SMALL.split(), "--dry-run", "--workers", "0") == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others


def test_the_best_weights_of_a_lost_run_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "netG_best.pth").write_bytes(b"best")
    with pytest.raises(SystemExit, match="2"):
        here(tmp_path / "out", *SMALL.split(), "--dry-run", "--workers", "0")
    assert "holds weights, but no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "out" / "netG_best.pth").read_bytes() == b"best"


# Processes


def test_what_a_killed_run_left_half_written_is_cleaned_up(base, unbroken):
    folder = shutil.copytree(unbroken, base / "left" / "out")
    for name in (".checkpoint.pth.4242.part", ".losses.png.7.part"):
        (folder / name).write_bytes(b"half")
    assert here(folder, "--resume", "--niter", "4") == 0
    assert list(folder.glob(".*.part")) == []


def test_a_killed_preparation_leaves_nothing_for_long(tmp_path):
    write(tmp_path / "photos", *(f"{i:03d}.png" for i in range(300)))
    options = [*FOLDER, "--dataroot", "../photos", "--workers", "0", "--dry-run"]
    process = start(tmp_path / "run", "dcgan.py", *options)
    wait_for(lambda: list((tmp_path / "cache").rglob(".*.part")), process)
    process.kill()
    process.communicate()
    left = list((tmp_path / "cache").rglob(".*.part"))
    assert not (tmp_path / "run" / "out").exists()
    finish(start(tmp_path / "run", "dcgan.py", *options))
    assert len(left) <= 2
    assert list((tmp_path / "cache").rglob(".*.part")) == []


def test_pictures_are_prepared_once_by_runs_that_start_together(tmp_path):
    write(tmp_path / "photos", *(f"{i:03d}.png" for i in range(200)))
    options = [*FOLDER, "--dataroot", "../photos", "--workers", "0", "--dry-run"]
    processes = [start(tmp_path / f"run{i}", "dcgan.py", *options) for i in range(3)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("preparing 200 pictures" in output for output, _ in outputs) == 1
    assert len(list((tmp_path / "cache" / "dcgan").glob("*.npy"))) == 1


def test_a_second_interrupt_leaves_at_once_with_files_intact(base, unbroken):
    process = start(base / "twice", "dcgan.py", *RUN, "--niter", "500")
    wait_for((base / "twice" / "out" / "netG_epoch_1.pth").exists, process)
    process.send_signal(signal.SIGSTOP)  # so that both are there before it looks
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    for _ in range(50):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    for path in (base / "twice" / "out").glob("*.pth"):
        read_file(path)


@pytest.mark.parametrize("cache", ["none", "kept"])
def test_a_killed_decoding_process_ends_the_run_with_a_line(tmp_path, cache):
    options = streaming(tmp_path / "run", 4_000, cache)
    process = start(tmp_path / "run", "dcgan.py", *options, "--niter", "1000")
    wait_for(lambda: len(children(process.pid)) >= 2, process)
    end = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < end:  # one that has done its part may be spared
        for child in children(process.pid)[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    errors = finish(process, 1)
    assert "dcgan.py: decoding pictures failed" in errors
    assert list(tmp_path.rglob(".*.part")) == []


def test_a_killed_run_leaves_no_processes(tmp_path):
    process = start(tmp_path / "run", "dcgan.py", *streaming(tmp_path / "run", 500), "--niter", "1000")
    wait_for(lambda: len(children(process.pid)) >= 2, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    for _ in range(1_000):
        if not any(map(alive, workers)):
            break
        time.sleep(0.02)
    assert not any(map(alive, workers))


HANDLER = """
import signal, sys
sys.path.insert(0, {root!r})
from data import load_images
images = load_images("fake", None, 16, cache="none", workers=2)
next(images.batches(4, 0, 0))
print(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
"""


def test_no_handler_can_raise_anywhere():
    code = HANDLER.format(root=str(Path(dcgan.__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


ORPHAN = """
import os, sys, time
sys.path.insert(0, {root!r})
from support.decoding import worker_init
main = os.getpid()
if os.fork():
    worker_init(os.getppid(), 0)  # its parent is there
    print("stays", flush=True)
    os._exit(0)
while os.getppid() == main:
    time.sleep(0.01)
worker_init(main, 0)
print("stays as well", flush=True)
"""


def test_a_process_that_begins_as_an_orphan_ends():
    code = ORPHAN.format(root=str(Path(dcgan.__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("stays\n", "")


def test_a_stopped_run_that_decodes_at_every_use_continues_exactly(tmp_path):
    options = streaming(tmp_path / "run")
    finish(start(tmp_path / "whole", "dcgan.py", *options, "--niter", "3"))
    process = start(tmp_path / "run", "dcgan.py", *options, "--niter", "3")
    log = tmp_path / "run" / "out" / "log.csv"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process)
    process.send_signal(signal.SIGHUP)
    assert "SIGHUP: saved in out" in finish(process, 129)
    assert checkpoint(tmp_path / "run" / "out")["steps"] < 24
    finish(start(tmp_path / "run", "dcgan.py", *options, "--niter", "3", "--resume"))
    assert_same_run(tmp_path / "run" / "out", tmp_path / "whole" / "out")


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_lose_nothing(tmp_path, capsys):
    options, draw = (*RUN, "--niter", "120", "--log-every", "5"), random.Random()
    finish(start(tmp_path / "whole", "dcgan.py", *options), seconds=900)
    out, kills, further = tmp_path / "run" / "out", 0, 0
    log = out / "log.csv"
    while kills < 100:
        before, since = steps_of(out), time.time()
        process = start(tmp_path / "run", "dcgan.py", *options, "--resume")
        if kills % 4:  # while it trains and saves; every fourth time from the first moment on
            wait_for(lambda since=since: log.exists() and log.stat().st_mtime > since, process)
            time.sleep(draw.uniform(0, 1.5))
        else:
            time.sleep(draw.uniform(0, 6))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        kills, further = kills + 1, further + (steps_of(out) > before)
    finish(start(tmp_path / "run", "dcgan.py", *options, "--resume"), seconds=900)
    assert_same_run(out, tmp_path / "whole" / "out")
    pictures = [path.name for path in (tmp_path / "whole" / "out").glob("*_epoch_*")]
    different = [
        name for name in pictures if (out / name).read_bytes() != (tmp_path / "whole" / "out" / name).read_bytes()
    ]
    assert len(pictures) == 4 * 120
    assert different == []
    with capsys.disabled():
        print(f"\n{kills} kills, {further} of the lives came further than a save; all {len(pictures)} files the same")


def steps_of(folder):
    return checkpoint(folder)["steps"] if (folder / "checkpoint.pth").exists() else -1


# Diverging


def rows_of(steps, D_G_z1, loss_G):
    return [{"step": s, "D_G_z1": D_G_z1, "loss_G": loss_G(s)} for s in range(10, steps + 1, 10)]


@pytest.mark.parametrize(
    ("rows", "wins"),
    [
        (rows_of(2000, 0.01, lambda step: step), True),
        (rows_of(2000, 0.03, lambda step: step), False),  # D is not sure
        (rows_of(2000, 0.01, lambda step: -step), False),  # G recovers
        (rows_of(300, 0.01, lambda step: step), False),  # too soon
        (rows_of(2000, 0.01, lambda step: step)[-1:], False),
    ],
)
def test_a_hint_where_d_wins_for_good(rows, wins, capsys):
    assert dcgan.hint_if_D_wins(rows) == wins
    assert capsys.readouterr().err.count("hint: ") == wins


def test_the_hint_comes_once(tmp_path, capsys, monkeypatch):
    """G cannot move, D learns to tell its pictures from one colour: D wins."""
    monkeypatch.setattr(dcgan, "HINT_STEPS", 60)
    for i in range(16):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (255, i, 0)).save(tmp_path / "in" / f"{i}.png")
    build = dcgan.build_training

    def with_a_helpless_generator(*arguments):
        training = build(*arguments)
        training.optimizerG.param_groups[0]["lr"] = 0.0
        return training

    monkeypatch.setattr(dcgan, "build_training", with_a_helpless_generator)
    options = (
        f"--dataroot {tmp_path / 'in'} --batchSize 8 --niter 200 --lr 0.002 --save-every 200 --log-every 5".split()
    )
    assert here(tmp_path / "out", *FOLDER, *options, "--manualSeed", "1") == 0
    assert capsys.readouterr().err.count("hint: for 60 steps") == 1


# Pictures


def test_every_skipped_picture_is_named(tmp_path, capsys):
    write(tmp_path / "in", *(f"{i}.png" for i in range(20)))
    undecodable = [os.fsdecode(name) for name in (b"c\xff.gif", b"\xfed.webp", b"e\xff.png")]
    broken = ["bad one.jpg", "übel.png", *undecodable]  # of the three that are shown, one at least is undecodable
    for name in broken:
        (tmp_path / "in" / name).write_bytes(b"no picture")
    options = [*FOLDER, "--dry-run", "--workers", "0"]
    for cache in ("none", tmp_path / "cache"):
        out = tmp_path / f"out-{Path(cache).name}"
        assert here(out, *options, "--dataroot", tmp_path / "in", "--cache", cache) == 0
        assert "5 pictures that cannot be read were left out: " in capsys.readouterr().err
        listed = (out / "skipped.txt").read_bytes().splitlines()
        assert sorted(line.split(b" (")[0] for line in listed) == sorted(os.fsencode(name) for name in broken)


def test_names_that_the_terminal_cannot_show_end_no_run(tmp_path):
    folder = tmp_path / "run" / os.fsdecode("bilder-ü-".encode() + b"\xff")
    write(folder, "ä.png", "b.png")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = [*FOLDER, "--workers", "0", "--niter", "1"]
    for arguments in ([*options, "--dataroot", folder], ["--resume", "--niter", "2"]):
        command = [sys.executable, ROOT / "dcgan.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path / "run", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cache", ["none", None])
def test_pipes_devices_and_huge_files_are_passed_over(tmp_path, cache):
    write(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    os.mkfifo(tmp_path / "in" / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "in" / "huge.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**29 + 1)  # nothing but a hole
    images = load_images("folder", tmp_path / "in", 16, cache=cache or tmp_path / "cache")
    assert sum(map(len, images.batches(4, 0, 0))) == 9
    assert sorted(images.skipped) == ["huge.png (more than 512 MB)", "pipe.jpg (not a file)", "zero.png (not a file)"]


MEMORY = """
import resource, sys
from data import load_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = load_images("folder", sys.argv[1], 64, cache="none")
list(images.batches(4, 0, 0))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, images.skipped)
"""


@pytest.mark.slow
def test_the_largest_picture_takes_less_than_2_gb(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.zeros((9_459, 9_459, 4), np.uint8)  # just within the limit; transparent, which takes the most
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", compress_level=1)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in")]
    megabytes, skipped = subprocess.check_output(command, cwd=ROOT, text=True).split(maxsplit=1)
    assert skipped == "[]\n"
    assert 500 < int(megabytes) < 2_000  # it was decoded


def test_fewer_pictures_than_a_batch_train(tmp_path, capsys):
    write(tmp_path / "in", "a.png", "b.png", "c.png")
    assert here(tmp_path / "out", *FOLDER, "--dataroot", tmp_path / "in", "--workers", "0", "--niter", "2") == 0
    assert "fewer pictures than --batchSize 128: every step takes all 3" in capsys.readouterr().out
    assert [row["images"] for row in log_rows(tmp_path / "out")] == [3, 6]


def test_any_number_of_samples_takes_the_same_memory(tmp_path):
    torch.save(randomised(Generator(4, 4, 3, 16)).state_dict(), tmp_path / "w.pth")
    code = (
        "import generate, resource, sys; generate.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    megabytes = []
    for count in ("100", "4000"):
        options = ["--load_path", tmp_path / "w.pth", "--outf", tmp_path / count, "--num_output", count]
        output = subprocess.check_output([sys.executable, "-c", code, *options], cwd=ROOT, text=True)
        megabytes.append(int(output.split()[-1]))
        assert len(list((tmp_path / count).glob("seed*.png"))) == int(count)
    assert megabytes[1] - megabytes[0] < 20


# Weights


def packed(path, state):
    """A file a thousandth as large as what it unpacks to."""
    torch.save({name: torch.zeros_like(t) for name, t in state.items()}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped,
    ):
        for part in whole.namelist():
            zipped.writestr(part, whole.read(part))


def expanded(path, state):
    """One number that claims to be 64 GB of weights."""
    huge = torch.ones(1).as_strided((1_000_000, 1000, 4, 4), (0, 0, 0, 0))
    torch.save(state | {next(iter(state)): huge}, path)


def cyclic(path, state):
    tree = {"netG": torch.zeros(3), "list": []}
    tree["again"] = {"up": tree}
    torch.save(tree, path)


def deep(path, state):
    tree = {}
    for _ in range(200):
        tree = {"down": tree}
    torch.save(tree, path)


def without_contents(path, state):
    torch.save({name: t.to("meta") for name, t in state.items()}, path)


def sparse(path, state):
    torch.save({name: t.to_sparse() for name, t in state.items()}, path)


@pytest.mark.parametrize("make", [packed, expanded, cyclic, deep, without_contents, sparse])
def test_weights_files_take_no_more_memory_than_their_size(tmp_path, make):
    make(tmp_path / "w.pth", randomised(Generator(10, 8, 3, 16)).state_dict())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refusal:
        load_generator(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def other_moments(state):
    next(iter(state["optimizerG"]["state"].values()))["exp_avg"] = torch.zeros(3)


def other_networks(state):
    state["netG"] = Generator(10, 16, 3, 16).state_dict()


def no_noise(state):
    del state["noise"]


@pytest.mark.parametrize("change", [other_moments, other_networks, no_noise])
def test_a_checkpoint_that_does_not_fit_is_refused(base, unbroken, capsys, change):
    folder = shutil.copytree(unbroken, base / change.__name__)
    state = checkpoint(folder)
    change(state)
    torch.save(state, folder / "checkpoint.pth")
    before = hashes(folder)
    assert here(folder, "--resume", "--niter", "9") == 2
    assert "dcgan.py: --resume: the checkpoint in" in capsys.readouterr().err
    assert hashes(folder) == before


# Memory


def test_too_little_memory_is_error_text(tmp_path):
    options = ["--dataset", "fake", "--imageSize", "128", "--batchSize", "1000", "--niter", "1", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, ROOT / "dcgan.py", *options, "--cache", tmp_path / "cache", "--outf", tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (9 * 2**30, 9 * 2**30)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "dcgan.py: cpu has too little memory for --batchSize 1000; a smaller one needs less"
    )
    assert "Traceback" not in done.stderr
    RunFolder(tmp_path / "out").load_checkpoint()
