"""Several processes on one CPU against one, and against gradients computed plainly; whole jobs, stopped and killed."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_commands import RUN, assert_same_run, checkpoint, finish, here, log_rows, start, wait_for
from test_faults import alive, children
from test_training import networks, tensors_of

from models import load_generator
from support.distributed import shard
from training import bce

ROOT = Path(__file__).parents[1]
NZ, SIZE = 10, 16
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# One of several processes: takes a step of lr 0 for each case and keeps its gradients; then 20 steps of the usual kind.
WORKER = """
import copy, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {tests!r}]
from test_training import multiplied, networks
from training import Trainer
from support.distributed import init_distributed, shard
rank, processes = init_distributed()
found = {{}}
for sync_bn in (False, True):
    for count in (12, 7, 2):
        settings = {{"beta1": 0.5, "ema": 0.9, "precision": "fp32", "seed": 7, "sync_bn": sync_bn}}
        run = Trainer(*networks(), torch.device("cpu"), lr=0.0, **settings, batch_size=count // processes)
        training = multiplied(run)
        draw = torch.Generator().manual_seed(3)
        pictures = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)
        training.step(shard(pictures, rank, processes), count)
        found[sync_bn, count] = [[p.grad.clone() for p in net.parameters()] for net in (training.netG, training.netD)]
training = multiplied(Trainer(*networks(), torch.device("cpu"), lr=0.002, **settings))
draw = torch.Generator().manual_seed(4)
for i in range(20):
    count = 12 if i % 7 else 5
    pictures = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)
    training.step(shard(pictures, rank, processes), count)
    if i == 9:
        half = copy.deepcopy(training.state_dict())
state = training.state_dict()
again = multiplied(Trainer(*networks(1), torch.device("cpu"), lr=0.002, **settings))
again.load_state_dict(half)
draw = torch.Generator().manual_seed(4)
for i in range(20):
    count = 12 if i % 7 else 5
    pictures = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)
    if i > 9:
        again.step(shard(pictures, rank, processes), count)
names = ("netG", "netD", "netG_ema", "optimizerG", "optimizerD")
for which, state in (("trained", state), ("continued", again.state_dict())):
    found[which] = {{name: state[name] for name in names}}
torch.save(found, f"{{sys.argv[1]}}/{{rank}}.pth")
"""


def job(processes, rank):
    """Return the environment of one of several processes."""
    return {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """Return what each of some processes found."""
    folder = tmp_path_factory.mktemp("job")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, str(folder)]
    jobs = [os.environ | port | job(request.param, rank) for rank in range(request.param)]
    processes = [subprocess.Popen(command, env=environment) for environment in jobs]
    assert [process.wait(100) for process in processes] == [0] * request.param
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(request.param)]


def plain_gradients(netG, netD, pictures, z):
    """Return the gradients of G and of D, each of its own objective, on one batch."""
    real = pictures.float() / 127.5 - 1
    loss_D = bce(netD.logits(real), real=True) + bce(netD.logits(netG(z).detach()), real=False)
    loss_G = bce(netD.logits(netG(z)), real=True)
    pairs = ((loss_G, netG), (loss_D, netD))
    return [torch.autograd.grad(loss, list(net.parameters())) for loss, net in pairs]


def batch_of(count, processes):
    """Return (pictures, latents) of each process: noise of its own, as training draws it."""
    draw = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    for rank in range(processes):
        part = shard(pictures, rank, processes)
        yield part, torch.randn(len(part), NZ, generator=torch.Generator().manual_seed(7 + rank))


@pytest.mark.parametrize("count", [12, 7, 2])
def test_gradients_are_the_means_of_the_parts(found, count):
    """Batch norm over each part; every picture counts the same, also where parts differ or a process has none."""
    parts = [plain_gradients(*networks(), *part) for part in batch_of(count, len(found)) if len(part[0])]
    sizes = [len(part) for part, _ in batch_of(count, len(found)) if len(part)]
    for which in (0, 1):
        expected = [
            sum(size * gradient for size, gradient in zip(sizes, gradients, strict=True)) / count
            for gradients in zip(*(part[which] for part in parts), strict=True)
        ]
        for process in found:
            torch.testing.assert_close(process[False, count][which], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [12, 7, 2])
def test_with_synchronized_batch_norm_they_are_those_of_one_process(found, count):
    pictures, z = (torch.cat(parts) for parts in zip(*batch_of(count, len(found)), strict=True))
    expected = plain_gradients(*networks(), pictures, z)
    for process in found:
        for ours, theirs in zip(process[True, count], expected, strict=True):
            torch.testing.assert_close(ours, list(theirs), rtol=1e-4, atol=1e-5)


def test_all_processes_end_up_with_the_same_weights(found):
    first = tensors_of(found[0]["trained"])
    for process in found[1:]:
        others = tensors_of(process["trained"])
        assert {name for name in first if not torch.equal(first[name], others[name])} <= {
            name
            for name in first
            if "running_" in name  # batch norm's are each process's own
        }
    assert not torch.equal(first["/netG/main.0.weight"], networks()[0].state_dict()["main.0.weight"])


def test_continued_training_is_the_same_bit_for_bit(found):
    """Also with three processes, where the order of a sum counts."""
    for process in found[:1]:  # the running statistics of the others begin with the first's
        continued, trained = tensors_of(process["continued"]), tensors_of(process["trained"])
        assert [name for name in trained if not torch.equal(trained[name], continued[name])] == []


@pytest.mark.parametrize(("count", "processes"), list(itertools.product((0, 1, 2, 7, 12), (1, 2, 3, 8))))
def test_parts_have_every_picture_once(count, processes):
    parts = [shard(range(count), rank, processes) for rank in range(processes)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Whole jobs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def unbroken(base):
    """The folder of a job of two processes that was never stopped."""
    finish(start(base / "unbroken", "dcgan.py", *RUN, "--ngpu", "2"))
    return base / "unbroken" / "out"


def family(pid):
    """Return the process ids of all that descend from a process."""
    return [each for child in children(pid) for each in (child, *family(child))]


def test_a_job_leaves_what_one_process_leaves(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert {"netG_epoch_2.pth", "netG_ema_epoch_2.pth", "progress.gif", "losses.png", "checkpoint.pth"} <= names
    rows = log_rows(unbroken)
    assert int(rows[-1]["images"]) == 3 * 1000
    assert int(rows[-1]["step"]) == 3 * 63
    assert len({row["step"] for row in rows}) == len(rows)
    state = torch.load(unbroken / "netG_epoch_2.pth", weights_only=True)
    assert all(name.startswith("main.") for name in state)
    assert load_generator(unbroken).image_size == 16


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_job_continues_exactly(base, unbroken, name, code):
    folder = base / name
    process = start(folder, "dcgan.py", *RUN, "--ngpu", "2")
    wait_for(lambda: "\n1," in "\n" + log(folder), process)
    process.send_signal(getattr(signal, name))
    assert re.fullmatch(f"{name}: saved in out; with --resume it goes on at epoch ., step .*\n", finish(process, code))
    assert checkpoint(folder / "out")["steps"] < 189
    finish(start(folder, "dcgan.py", "--resume", "--ngpu", "2"))
    assert_same_run(folder / "out", unbroken)


def log(folder):
    path = folder / "out" / "log.csv"
    return path.read_text() if path.exists() else ""


def test_a_killed_process_takes_the_job_down(base):
    folder = base / "killed"
    process = start(folder, "dcgan.py", *RUN, "--niter", "1000", "--ngpu", "2")
    wait_for(lambda: "\n1," in "\n" + log(folder), process)
    everyone = family(process.pid)
    workers = [pid for pid in everyone if b"dcgan.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    since = time.time()
    os.kill(workers[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert time.time() - since < 40
    assert not any(map(alive, everyone))


def test_a_restarted_job_goes_on_by_itself(base, unbroken):
    folder = base / "restarted"
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", str(ROOT / "dcgan.py"), *RUN, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(base / "cache")}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "\n1," in "\n" + log(folder), process)
    workers = [pid for pid in family(process.pid) if b"dcgan.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors
    assert_same_run(folder / "out", unbroken)


def test_a_job_goes_on_with_another_number_of_processes(base, unbroken, capsys):
    subprocess.run(["cp", "-r", str(unbroken), str(base / "alone")], check=True)
    assert here(base / "alone", "--resume", "--niter", "4") == 0
    assert "2 processes began what 1 go on with: not bit for bit" in capsys.readouterr().out
    assert checkpoint(base / "alone")["steps"] == 4 * 63


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ngpu", "3"], "--batchSize 16 does not divide among 3 processes (--ngpu); 15 and 18 would"),
        (["--ngpu", "32"], "--batchSize 16 does not divide among 32 processes (--ngpu); 32 would"),
        (["--ngpu", "2", "--cuda"], "--ngpu 2: torch finds 0 CUDA devices here"),
    ],
)
def test_jobs_that_cannot_work_are_refused(tmp_path, capsys, options, words):
    if "--cuda" in options and torch.cuda.is_available():
        pytest.skip("has CUDA devices")
    with pytest.raises(SystemExit, match="2"):
        here(tmp_path / "out", *RUN, *options)
    assert capsys.readouterr().err == f"dcgan.py: {words}\n"
    assert not (tmp_path / "out").exists()
