"""What only a CUDA device can show: the captured step, images kept on the device, both programs."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same, hashes, randomised

import training as training_module
from data import PreparedImages
from models import Discriminator, Generator, generate_images, latents
from support.accelerator import default_precision
from support.captured_step import WARM_UP, CapturedStep
from training import Trainer, TrainerSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BATCH = 16


@pytest.fixture(autouse=True)
def _one_kernel_for_all_runs():
    """Let two runs of the same step be compared bit for bit."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic = False


def trainer_on(device, batch_size=BATCH, precision="bf16", **settings):
    """Return a Trainer; with a batch_size of 0, none of its steps is captured or compiled."""
    torch.manual_seed(0)
    settings = {"lr": 0.002, "ema": 0.9, "seed": 7, "precision": precision, "shard_size": batch_size} | settings
    nets = Generator(10, 16, 3, 32), Discriminator(16, 3, 32)
    return Trainer(*nets, torch.device(device), TrainerSettings(**settings))


def captured_and_plain(precision="bf16", augment="none", **settings):
    random = {"flip": True, "augment": augment}
    return trainer_on("cuda", BATCH, precision, **random, **settings), trainer_on("cuda", 0, precision, **random)


def random_batches(count, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=draw) for _ in range(count)]


def assert_close(trainer, other):
    for name in ("netG", "netD", "netG_ema"):
        ours, theirs = trainer.state_dict()[name], other.state_dict()[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(trainer.rng.get_state(), other.rng.get_state())
    assert trainer.steps_taken == other.steps_taken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("augment", ["none", "color,translation,cutout"])
def test_captured_steps_equal_plain_ones(precision, augment, capsys, recwarn):
    captured, plain = captured_and_plain(precision, augment=augment)
    for batch in random_batches(WARM_UP + 4):
        torch.testing.assert_close(captured.step(batch), plain.step(batch), rtol=1e-3, atol=1e-3)
    assert isinstance(captured.captured_step, CapturedStep)
    assert captured.captured_step.graph is not None
    assert plain.captured_step.graph is None
    assert_close(captured, plain)
    for optimizer, other in ((captured.optimizerG, plain.optimizerG), (captured.optimizerD, plain.optimizerD)):
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {float(state["step"]) for state in other.state.values()} == {WARM_UP + 4.0}
    assert capsys.readouterr().err == ""
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_branch_of_the_graph_changes_no_bit(monkeypatch, compiled, precision):
    """At the default size, where its kernels run at the same time as others."""

    def states():
        torch.manual_seed(0)
        settings = {"augment": "translation", "shard_size": 128, "compile": compiled, "precision": precision}
        trainer = Trainer(Generator(), Discriminator(), torch.device("cuda"), TrainerSettings(**settings))
        draw = torch.Generator().manual_seed(1)
        for _ in range(WARM_UP + 20):
            trainer.step(torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8, generator=draw))
        assert trainer.captured_step.graph is not None
        return trainer.state_dict()

    branched = states()
    monkeypatch.setattr(training_module, "graph_branch", lambda device: contextlib.nullcontext(lambda: None))
    assert_same(branched, states())


def test_smaller_batches_between_captured_steps():
    captured, plain = captured_and_plain()
    small = [random_batches(1)[0][:5]], [random_batches(1)[0][:1]]
    for batch in random_batches(WARM_UP + 2) + small[0] + random_batches(2, seed=4) + small[1] + random_batches(1):
        captured.step(batch), plain.step(batch)
    assert_close(captured, plain)


def test_training_resumed_after_a_capture(tmp_path):
    unbroken, first, second = (trainer_on("cuda", flip=True) for _ in range(3))
    for batch in random_batches(WARM_UP + 6):
        unbroken.step(batch)
    for batch in random_batches(WARM_UP + 6)[: WARM_UP + 2]:
        first.step(batch)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    for batch in random_batches(WARM_UP + 1, seed=9):
        second.step(batch)  # captured with tensors that loading replaces
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for batch in random_batches(WARM_UP + 6)[WARM_UP + 2 :]:
        second.step(batch)
    assert_close(second, unbroken)


def in_captures(monkeypatch, do):
    """Let every captured step call do(its result)."""
    step = training_module.train_step

    def changed_step(*arguments):
        result = step(*arguments)
        if torch.cuda.is_current_stream_capturing():
            do(result)
        return result

    monkeypatch.setattr(training_module, "train_step", changed_step)


def test_training_goes_on_where_a_capture_fails(monkeypatch, capsys):
    """With the same random numbers, and one warning. To wait for the device is not permitted in a capture."""
    captured, plain = captured_and_plain()
    in_captures(monkeypatch, lambda result: result.loss_D.item())
    for batch in random_batches(WARM_UP + 4):
        torch.testing.assert_close(captured.step(batch), plain.step(batch), rtol=1e-3, atol=1e-3)
    assert captured.captured_step.graph is None
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert_close(captured, plain)
    assert capsys.readouterr().err.count("warning: no CUDA graph, so training is slower (") == 1


def test_too_little_memory_in_a_capture_is_raised(monkeypatch):
    captured, plain = captured_and_plain()

    def fail(result):
        raise torch.OutOfMemoryError("CUDA out of memory")

    in_captures(monkeypatch, fail)
    *warm_up, last = random_batches(WARM_UP + 1)
    for batch in warm_up:
        captured.step(batch), plain.step(batch)
    with pytest.raises(torch.OutOfMemoryError):
        captured.step(last)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(captured.rng.get_state(), plain.rng.get_state())


def test_a_state_saved_on_the_gpu_is_resumed_without_one(tmp_path):
    trainer, cpu = trainer_on("cuda"), trainer_on("cpu", precision="fp32")
    for batch in random_batches(WARM_UP + 2):
        trainer.step(batch)
    torch.save(trainer.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert state["netG"]["main.0.weight"].device.type == "cpu"  # as saved, without map_location
    cpu.load_state_dict(state)
    assert cpu.step(random_batches(1)[0]).isfinite().all()


def test_images_kept_on_the_device_come_in_the_same_order():
    rows = np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), np.uint8)
    here, there = PreparedImages(rows, [], []), PreparedImages(rows, [], [])
    there.cache_on(torch.device("cuda"), rows.nbytes * 3 + 3)
    for ours, theirs in zip(here.batches(8, 1, 2), there.batches(8, 1, 2), strict=True):
        assert theirs.is_cuda
        assert torch.equal(ours, theirs.cpu())


def test_images_do_not_depend_on_their_batch():
    netG = Generator(10, 16, 3, 32).cuda()
    z = latents(range(200), 10)
    assert torch.equal(generate_images(netG, z)[70:73], generate_images(netG, z[70:73]))


@pytest.mark.slow
def test_compiled_and_captured_steps_are_close_to_plain_ones(monkeypatch):
    """In full float32 and with a small learning rate: training amplifies a difference in the last bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fast, plain = (trainer_on("cuda", size, "fp32", lr=0.0002, compile=size > 0) for size in (BATCH, 0))
    for batch in random_batches(WARM_UP + 3):
        torch.testing.assert_close(fast.step(batch), plain.step(batch), rtol=1e-2, atol=1e-2)
    assert fast.captured_step.graph is not None


def run(program, *options):
    """Run a program; check that it succeeds without a warning; return what it printed."""
    command = [sys.executable, ROOT / program, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return done.stdout


def test_both_programs(tmp_path):
    sizes = ("--dataset", "fake", "--imageSize", "16", "--ngf", "8", "--ndf", "8", "--cache", tmp_path / "cache")
    out, precision = tmp_path / "out", f"--precision   {default_precision(torch.device('cuda'))}"
    assert precision in run("dcgan.py", *sizes, "--cuda", "--niter", "2", "--outf", out)
    assert precision in run("dcgan.py", "--cuda", "--niter", "3", "--resume", "--outf", out)
    run("generate.py", "--cuda", "--load_path", out, "--outf", tmp_path / "generated")
    run("generate.py", "--load_path", out, "--outf", tmp_path / "generated-on-the-cpu")


def test_generate_writes_equal_bytes_each_time(tmp_path):
    """In two processes, and with another batch size."""
    torch.save(randomised(Generator()).state_dict(), tmp_path / "netG.pth")
    options = ("--cuda", "--load_path", tmp_path / "netG.pth", "--num_output", "100", "--outf")
    run("generate.py", *options, tmp_path / "first")
    run("generate.py", *options, tmp_path / "second", "--batchSize", "7")
    assert len(hashes(tmp_path / "first")) == 100
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
