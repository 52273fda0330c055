"""Two and three processes on one CPU: gradients against plain ones, and whole jobs: stopped, killed, restarted."""

import argparse
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    NZ,
    ROOT,
    RUN,
    assert_same,
    assert_same_run,
    checkpoint,
    children,
    finish,
    fork,
    is_alive,
    log_rows,
    networks,
    random_batches,
    run_dcgan,
    start,
    tensors_of,
    wait_for,
)

import dcgan
from data import PreparedImages
from models import load_generator
from support import distributed
from support.distributed import is_lost_process, launch_processes, run_and_exit, shard
from support.errors import UserError
from training import StepResult, bce


def skip_without_linux():
    if sys.platform != "linux":
        pytest.skip("forks, and looks into /proc")


# Steps


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def exit_codes(processes, seconds=100):
    """Wait for forked processes; return their exit codes, after killing those that do not end."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_program(name, *arguments):
    """Run a program of tests/programs in this process."""
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(ROOT / "tests" / "programs" / name), run_name="__main__")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Return {world size: what each process of such a job found}."""
    skip_without_linux()
    folder = tmp_path_factory.mktemp("steps")
    ports = free_port(), free_port()
    processes = [fork(run_program, "distributed_steps.py", folder, rank, *ports) for rank in range(3)]
    assert exit_codes(processes) == [0, 0, 0]
    found = {size: [folder / f"{size}-{rank}.pth" for rank in range(size)] for size in (2, 3)}
    return {size: [torch.load(path, weights_only=True) for path in paths] for size, paths in found.items()}


def plain_gradients(netG, netD, images, z):
    """Return the gradients of G and of D, each of its own objective, on one batch."""
    real = images.float() / 127.5 - 1
    loss_D = bce(netD.logits(real), 1) + bce(netD.logits(netG(z).detach()), 0)
    loss_G = bce(netD.logits(netG(z)), 1)
    pairs = ((loss_G, netG), (loss_D, netD))
    return [torch.autograd.grad(loss, list(net.parameters())) for loss, net in pairs]


def shards_of(count, world_size):
    """Return (images, latent vectors) of each process: noise of its own, as the Trainer draws it."""
    images, size = random_batches(1, count)[0], count // world_size
    for rank in range(world_size):
        noise = torch.Generator().manual_seed(7 + rank)
        yield images[rank * size : (rank + 1) * size], torch.randn(size, NZ, generator=noise)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [12, 6])
def test_gradients_are_the_means_of_the_shards_gradients(jobs, world_size, count):
    shards = [plain_gradients(*networks(), *each) for each in shards_of(count, world_size)]
    for net in (0, 1):
        expected = [sum(each) / world_size for each in zip(*(gradients[net] for gradients in shards), strict=True)]
        for process in jobs[world_size]:
            torch.testing.assert_close(process[False, count][net], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [12, 6])
def test_with_sync_batch_norm_they_are_those_of_one_process(jobs, world_size, count):
    images, z = (torch.cat(parts) for parts in zip(*shards_of(count, world_size), strict=True))
    expected = plain_gradients(*networks(), images, z)
    for process in jobs[world_size]:
        for ours, theirs in zip(process[True, count], expected, strict=True):
            torch.testing.assert_close(ours, list(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_processes_end_up_with_the_same_weights(jobs, world_size, sync_bn):
    """Running statistics are each process's own, unless batch norm is synchronised."""
    first, *others = (tensors_of(process["unbroken", sync_bn]) for process in jobs[world_size])
    for other in others:
        different = {name for name in first if not torch.equal(first[name], other[name])}
        assert different <= (set() if sync_bn else {name for name in first if "running_" in name})
    assert not torch.equal(first["/netG/main.0.weight"], networks()[0].state_dict()["main.0.weight"])


@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_resumed_training_equals_unbroken_training(jobs, world_size, sync_bn):
    """Bit for bit, also with three processes, where the order of a sum counts."""
    for process in jobs[world_size]:
        assert_same(process["resumed", sync_bn], process["unbroken", sync_bn])


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_are_exchanged(jobs, world_size):
    """All processes get the same: averages over all, rank 0's object, everyone's objects, the largest, the mean."""
    mean_rank = (world_size - 1) / 2
    for process in jobs[world_size]:
        assert [process["averages"][name] for name in StepResult._fields] == pytest.approx([1.5 * (mean_rank + 1)] * 7)
        assert process["broadcast"] == 0
        assert process["gathered"] == list(range(world_size))
        assert process["max"] == world_size - 1
        assert process["mean"].tolist() == pytest.approx([mean_rank, 1.0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_shards_are_equal_and_in_order(count, world_size):
    """What remains belongs to none."""
    shards = [list(shard(range(count), rank, world_size)) for rank in range(world_size)]
    assert {len(each) for each in shards} == {count // world_size}
    assert [i for each in shards for i in each] == list(range(count - count % world_size))


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5434", True),
        ("Read error [127.0.0.1]:40: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_the_end_of_another_process_is_recognised(monkeypatch, message, lost):
    assert not is_lost_process(RuntimeError(message))  # of one process alone it is something else
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    assert is_lost_process(RuntimeError(message)) == lost


def stop_here(code=None):
    raise SystemExit(code)


def fail():
    raise ValueError("a mistake")


@pytest.mark.parametrize(("main", "code"), [(lambda: 0, 0), (lambda: 143, 143), (lambda: stop_here(2), 2), (fail, 1)])
def test_a_process_leaves_its_job_unless_it_failed(monkeypatch, capsys, main, code):
    """One that failed must not wait for the others. The exit code is the same."""
    left = []
    for joined in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda joined=joined: joined)
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda joined=joined: left.append(joined))
        monkeypatch.setattr(os, "_exit", stop_here)
        with pytest.raises(SystemExit) as end:
            run_and_exit(main)
        assert end.value.code == code
        assert ("ValueError: a mistake" in capsys.readouterr().err) == (main is fail)
    assert left == ([] if code in (1, 2) else [True])


# The launcher


def launch(folder, what):
    """Start launch_processes with two small programs in a forked process, which exits with the code it returns."""

    skip_without_linux()

    def run():
        os.environ["PYTHONPATH"] = str(ROOT)
        program = ROOT / "tests" / "programs" / "one_of_a_job.py"
        sys.exit(launch_processes(2, str(program), [str(folder), what]))

    return fork(run)


def ready(folder, process):
    """Wait for both programs of `launch`; return their process ids."""
    files = [folder / f"{rank}.ready" for rank in range(2)]
    while not all(path.exists() for path in files):
        assert process.is_alive()
        time.sleep(0.01)
    return [int(path.read_text()) for path in files]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_launcher_returns_the_code_of_the_first_that_failed(tmp_path, code):
    process = launch(tmp_path, str(code))
    assert exit_codes([process]) == [code]


@pytest.mark.parametrize(
    ("name", "to_all"), [("SIGTERM", False), ("SIGINT", False), ("SIGINT", True), ("SIGHUP", False)]
)
def test_the_launcher_passes_a_signal_on_and_waits(tmp_path, name, to_all):
    """From a cluster it comes to the launcher alone, from a terminal to all processes."""
    process, signum = launch(tmp_path, "wait"), getattr(signal, name)
    programs = ready(tmp_path, process)
    for pid in [process.pid, *programs] if to_all else [process.pid]:
        os.kill(pid, signum)
    assert exit_codes([process]) == [128 + signum]
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_the_launcher_stops_the_others_where_one_is_killed(tmp_path):
    process = launch(tmp_path, "wait")
    programs = ready(tmp_path, process)
    os.kill(programs[1], signal.SIGKILL)
    assert exit_codes([process]) == [128 + signal.SIGKILL]
    assert (tmp_path / "0.saved").exists()
    assert not any(map(is_alive, programs))


# Whole jobs

NITER = 4
JOB = [*RUN, "--niter", NITER]
STEPS = NITER * 63


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    skip_without_linux()
    return tmp_path_factory.mktemp("jobs")


def join_and_train(rank, port, folder):
    """Train as one of two processes, which find each other as a launcher tells them."""
    process = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= process | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    sys.exit(run_dcgan(folder, *JOB))


@pytest.fixture(scope="module")
def unbroken(base):
    """The folder of a job of two processes that was never stopped."""
    port, folder = free_port(), base / "unbroken" / "out"
    processes = [fork(join_and_train, rank, port, folder) for rank in range(2)]
    assert exit_codes(processes) == [0, 0]
    return folder


def descendants(pid):
    """Return the process ids of all that descend from a process."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def workers(process):
    """Return the process ids of a job's processes, without its launcher."""
    programs = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    return [pid for pid, command in programs.items() if b"dcgan.py" in command]


def last_step(folder):
    """Return the step of the last complete row of the log, 0 if there is none."""
    path = folder / "out" / "log.csv"
    lines = path.read_text().rpartition("\n")[0].splitlines()[1:] if path.exists() else []
    return int(lines[-1].split(",")[1]) if lines else 0


def wait_for_steps(folder, process, count=20):
    """Wait until a job has taken more steps than its checkpoint has."""
    at_least = last_step(folder) + count
    wait_for(lambda: last_step(folder) >= at_least, process)


def test_a_job_leaves_what_one_process_leaves(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    last = NITER - 1
    weights = {f"{name}_epoch_{last}.pth" for name in ("netG", "netD", "netG_ema")}
    assert weights | {"progress.gif", "losses.png", "checkpoint.pth"} <= names
    rows = log_rows(unbroken)
    assert int(rows[-1]["images"]) == NITER * 1000
    assert int(rows[-1]["step"]) == STEPS
    assert len({row["step"] for row in rows}) == len(rows)
    state = torch.load(unbroken / f"netG_epoch_{last}.pth", weights_only=True)
    assert all(name.startswith("main.") for name in state)
    assert load_generator(unbroken).image_size == 16


def test_a_stopped_and_restarted_job_ends_as_an_unbroken_one(base, unbroken):
    folder, port = base / "broken", free_port()
    folder.mkdir()

    # Stopped by SIGTERM
    processes = [fork(join_and_train, rank, port, folder / "out") for rank in range(2)]
    while last_step(folder) < 80:
        assert processes[0].is_alive()
        time.sleep(0.01)
    for process in processes:
        process.terminate()
    assert exit_codes(processes) == [143, 143]
    assert 80 <= checkpoint(folder / "out")["steps"] < STEPS

    # Resumed by torch's own launcher, which restarts it where a process is killed
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", ROOT / "dcgan.py", "--resume"]
    environment = os.environ | {"XDG_CACHE_HOME": str(base / "cache")}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_steps(folder, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors
    assert "another process of this job has ended, so this one ends" in errors
    assert "terminate called" not in errors
    assert "warning" not in errors.lower()
    assert_same_run(folder / "out", unbroken)


@pytest.mark.slow
def test_a_job_stopped_by_its_launcher_saves(base):
    process = start(base / "stopped", "dcgan.py", *JOB, "--ngpu", 2)
    wait_for_steps(base / "stopped", process, 80)
    process.send_signal(signal.SIGTERM)
    errors = finish(process, 143)
    assert re.fullmatch("SIGTERM: saved in out; --resume continues at epoch ., step .*\n", errors)


@pytest.mark.slow
def test_an_interrupted_and_killed_job_ends_as_an_unbroken_one(base, unbroken):
    folder, resume = base / "interrupted", ("--resume", "--ngpu", 2)

    # Interrupted by Ctrl-C in a terminal, which all processes get, and then once more from the launcher
    process = start(folder, "dcgan.py", *JOB, "--ngpu", 2)
    wait_for_steps(folder, process, 80)
    for pid in [process.pid, *workers(process)]:
        os.kill(pid, signal.SIGINT)
    errors = finish(process, 130)
    assert re.fullmatch("SIGINT: saved in out; --resume continues at epoch ., step .*\n", errors)

    # One process is killed, and takes the job down
    process = start(folder, "dcgan.py", *resume)
    wait_for_steps(folder, process)
    everyone, since = descendants(process.pid), time.monotonic()
    os.kill(workers(process)[-1], signal.SIGKILL)
    errors = finish(process, 128 + signal.SIGKILL, seconds=60)
    assert time.monotonic() - since < 40
    assert not any(map(is_alive, everyone))
    assert errors == (
        "dcgan.py: another process of this job has ended, so this one ends; saved files are intact\n"
        "dcgan.py: SIGKILL has killed a process of this job; saved files are intact\n"
    )

    finish(start(folder, "dcgan.py", *resume))
    assert_same_run(folder / "out", unbroken)


def test_a_job_resumes_with_another_number_of_processes(base, unbroken, capsys):
    shutil.copytree(unbroken, base / "alone" / "out")
    assert run_dcgan(base / "alone" / "out", "--resume", "--niter", NITER + 1) == 0
    note = "the number of processes has changed from 2 to 1: results will not be bit-identical"
    assert note in capsys.readouterr().out
    assert checkpoint(base / "alone" / "out")["steps"] == STEPS + 63


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ngpu", "3"], "--batchSize 16 cannot be shared evenly by 3 processes (--ngpu); use 15 or 18"),
        (["--ngpu", "32"], "--batchSize 16 cannot be shared evenly by 32 processes (--ngpu); use 32"),
        (["--ngpu", "2", "--cuda"], "--ngpu 2: torch finds 0 CUDA devices here"),
    ],
)
def test_jobs_that_cannot_work_are_refused(tmp_path, capsys, options, words):
    if "--cuda" in options and torch.cuda.is_available():
        pytest.skip("has CUDA devices")
    with pytest.raises(SystemExit, match="2"):
        run_dcgan(tmp_path / "out", *RUN, *options)
    assert capsys.readouterr().err == f"dcgan.py: {words}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("world_size", "others", "words"),
    [
        (1001, [], "1001 processes are too many for 1,000 images"),
        (
            2,
            [(999, "a")],
            "--dataroot: the processes find different images: 1000, 999; names and sizes must be equal too",
        ),
        (
            2,
            [(1000, "b")],
            "--dataroot: the processes find different images: 1000, 1000; names and sizes must be equal too",
        ),
    ],
)
def test_images_that_cannot_be_shared_are_refused(tmp_path, monkeypatch, world_size, others, words):
    options = {"dataset": "fake", "dataroot": None, "image_size": 16, "nc": 3, "classes": "", "workers": 0}
    images = PreparedImages(range(1000), [], [])
    images.fingerprints = {"files": "a"}
    monkeypatch.setattr(dcgan, "load_images", lambda *_, **__: images)
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, world_size))
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: value and [value, *others])
    with pytest.raises(UserError) as refusal:
        dcgan.prepare_images(argparse.Namespace(**options, crop=0, cache=str(tmp_path)), None)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
