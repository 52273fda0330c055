"""Faults caused for real: output that nobody takes, full disks, limits, kills. Complete files survive them all."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    FOLDER,
    ROOT,
    RUN,
    assert_same_run,
    checkpoint,
    files,
    finish,
    fork,
    run_dcgan,
    run_dcgan_forked,
    start,
    wait_for,
    write_images,
)
from PIL import Image

from models import Generator
from support.run_folder import RunFolder
from support.weights import read_file

resource = pytest.importorskip("resource")  # not on Windows
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="causes faults as Linux has them")

OUTPUTS = {  # name: redirection, and the backend that matplotlib is told to use: a missing one may end no run either
    "both closed": (">&- 2>&-", "module://no_such_module.backend"),
    "disk full": (">/dev/full", "nonsense"),
}
# With slow: halves of "both closed"; test_dcgan.py has a run that is stopped after its reader has gone.
MORE_OUTPUTS = {"stdout closed": ">&-", "stderr closed": "2>&-", "reader gone": "| true"}
SAMPLE_OUTPUTS = [">/dev/full 2>&-", pytest.param(">&- 2>/dev/full", marks=pytest.mark.slow)]


def run_program(folder, script, program, *arguments, **environment):
    """Run a program in the new `folder`, as "$@" of a shell script; return (the folder, what it wrote)."""
    folder.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache")} | environment
    command = ["sh", "-c", script, "sh", sys.executable, ROOT / program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return folder, done.stdout, done.stderr


def run_redirected(folder, redirection, program, *arguments, **environment):
    """Run a program with its output redirected; its exit code is in the file `code`."""
    script = f'{{ "$@"; echo $? >code; }} {redirection}'
    return run_program(folder, script, program, *arguments, **environment)


def run_on_disk(folder, options, program, *arguments):
    """Run a program where `disk` is a file system of its own, mounted with `options`.

    Its exit code is in the file `code`, its standard error in `errors`, and a copy of the disk in `kept`.
    """
    script = f"mkdir disk && mount -t tmpfs -o {options} tmpfs disk || exit\n"
    script += '"$@" 2>errors; echo $? >code; cp -r disk kept; umount disk'
    return run_program(folder, f"unshare -rm sh -c '{script}' sh \"$@\"", program, *arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_steps):
    """Processes that run, two at a time, beside the tests of this file: {name: the future of what they return}."""
    base, jobs = tmp_path_factory.mktemp("faults"), {}
    little = f"400 --dataset fake --batchSize 1000 --niter 1 --workers 0 --cache {base}/cache --outf out".split()
    with ThreadPoolExecutor(2) as pool:

        def submit(name, function, argument, *arguments, **environment):
            jobs[name] = pool.submit(function, base / name, argument, *arguments, **environment)

        submit("small disk", run_on_disk, "size=400k", "dcgan.py", *few_steps, "--niter", 5, "--outf", "disk/out")
        submit("fixed disk", run_on_disk, "ro", "dcgan.py", *RUN, "--outf", "disk/out", "--cache", "cache")
        submit("memory", run_redirected, "", "tests/programs/little_memory.py", *little)
        for name, (redirection, backend) in OUTPUTS.items():
            submit(name, run_redirected, redirection, "dcgan.py", *few_steps, MPLBACKEND=backend)
        yield jobs


# Signals


@pytest.mark.usefixtures("runs")  # which run beside it
def test_a_second_interrupt_leaves_at_once_with_files_intact(tmp_path):
    process = fork(run_dcgan_forked, tmp_path / "run", *RUN, "--niter", 500)
    out, end = tmp_path / "run" / "out", time.monotonic() + 60
    while not (out / "netG_epoch_0.pth").exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.003)
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there before it looks
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    for _ in range(50):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.002)
    process.join(60)
    assert process.exitcode in (130, -signal.SIGINT)
    for path in out.glob("*.pth"):
        read_file(path)


# Disks


@pytest.mark.parametrize(("limit", "words"), [(1_000, "--cache"), (40_000, "could not be written")])
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path, limit, words):
    """First of the prepared images, which take 31 KB; then of the first checkpoint."""
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(40)))

    def run_limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_dcgan_forked(tmp_path / "run", *FOLDER, "--dataroot", tmp_path / "in", "--workers", 0)

    process = fork(run_limited)
    process.join(100)
    assert process.exitcode == 1
    errors = (tmp_path / "run" / "errors").read_text()
    assert words in errors.splitlines()[-1]
    assert "File too large" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert list(tmp_path.rglob(".*.part")) == []


def code_and_errors(folder):
    if not (folder / "code").exists():
        pytest.skip("may not mount a file system here")
    return int((folder / "code").read_text()), (folder / "errors").read_text()


def test_a_full_disk_leaves_every_file_complete(tmp_path, runs, few_steps):
    """In a file system of 400 KB, which a run fills at its first saves."""
    assert run_dcgan(tmp_path / "unbroken", *few_steps, "--niter", 5) == 0
    folder, *_ = runs["small disk"].result()
    code, errors = code_and_errors(folder)
    assert code == 1
    assert errors.splitlines()[-1].startswith("dcgan.py: disk/out/")
    assert errors.splitlines()[-1].endswith("(No space left on device); files saved before it are intact")
    assert "Traceback" not in errors
    kept = folder / "kept" / "out"
    assert list(kept.glob(".*.part")) == []
    assert len(list(kept.glob("*.pth"))) > 1
    for path in kept.glob("*.pth"):
        read_file(path)
    for path in kept.glob("*.png"):
        Image.open(path).load()
    assert run_dcgan(kept, "--resume") == 0  # where there is space
    assert_same_run(kept, tmp_path / "unbroken")


def test_a_run_folder_that_cannot_be_written_is_refused(runs):
    """In a file system that is mounted read-only, which stops root as well."""
    folder, *_ = runs["fixed disk"].result()
    code, errors = code_and_errors(folder)
    expected = "dcgan.py: --outf disk/out: disk is not a writable folder; choose another --outf\n"
    assert (code, errors.replace(f"{folder}/", "")) == (2, expected)
    assert not (folder / "cache").exists()


# Memory


def test_too_little_memory_is_told_in_one_line(runs):
    """A layer's output alone takes 262 MB of the 400 that there are."""
    folder, _, errors = runs["memory"].result()
    assert errors == "dcgan.py: out of memory with --batchSize 1000; try a smaller one, in another --outf\n"
    assert (folder / "code").read_text() == "1\n"
    assert RunFolder(folder / "out").load_checkpoint()["steps"] == 0


# Output


def assert_trained(folder):
    """Check that a run of few_steps has ended well; return its run folder."""
    assert (folder / "code").read_text() == "0\n"
    state = read_file(folder / "out" / "checkpoint.pth")
    assert (state["epoch"], state["steps"]) == (2, 6)
    expected = {"checkpoint.prev.pth", "log.csv", "netG_ema_epoch_1.pth", "netG_epoch_1.pth", "progress.gif"}
    assert expected <= {path.name for path in files(folder / "out")}
    return folder / "out"


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_that_fails_ends_no_run_and_loses_no_checkpoint(runs, name):
    folder, output, errors = runs[name].result()
    out = assert_trained(folder)
    assert output == ""
    drawn = (out / "losses.png").exists()
    if name == "disk full" and not drawn:  # the backend of an unknown name
        assert errors.startswith("warning: losses.png is not drawn (")
        assert errors.count("\n") == 1
    else:
        assert (drawn, errors) == (True, "")  # neither a warning, nor what Python says at its end
    assert_same_run(out, runs["both closed"].result()[0] / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_OUTPUTS)
def test_one_stream_that_fails_leaves_the_other(tmp_path, few_steps, name):
    folder, output, errors = run_redirected(tmp_path / "run", MORE_OUTPUTS[name], "dcgan.py", *few_steps)
    assert_trained(folder)
    assert ("epoch 2/2: loss_D" in output, errors) == (name == "stderr closed", "")


@pytest.mark.parametrize("redirection", SAMPLE_OUTPUTS)
def test_output_that_fails_loses_no_generated_images(tmp_path, redirection):
    torch.manual_seed(0)
    torch.save(Generator(4, 4, 3, 16).state_dict(), tmp_path / "w.pth")
    sample = ["--load_path", tmp_path / "w.pth", "--num_output", 3, "--batchSize", 2]
    folder, output, errors = run_redirected(tmp_path / "run", redirection, "generate.py", *sample)
    assert ((folder / "code").read_text(), output, errors) == ("0\n", "", "")
    sizes = {path.name: Image.open(path).size for path in folder.rglob("*.png")}
    assert sizes == {"generated.png": (20, 56)} | {f"seed{k:06d}.png": (16, 16) for k in range(3)}


# Kills


def steps_of(folder):
    return checkpoint(folder)["steps"] if (folder / "checkpoint.pth").exists() else -1


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_lose_nothing(tmp_path, capsys):
    epochs, draw = 240, random.Random()  # more than a hundred lives take
    options = (*RUN, "--niter", epochs, "--log-every", "5")
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
    names = [path.name for path in (tmp_path / "whole" / "out").glob("*_epoch_*")]
    different = [name for name in names if (out / name).read_bytes() != (tmp_path / "whole/out" / name).read_bytes()]
    assert len(names) == 4 * epochs
    assert different == []
    with capsys.disabled():
        print(f"\n{kills} kills, {further} of the lives came further than a save; all {len(names)} files the same")
