"""What only a CUDA device can show: the captured step, pictures kept on the device, both commands."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import PreparedImages
from models import Discriminator, Generator, generate_images
from support.accelerator import WARM_UP, CapturedStep, default_precision
from support.latents import latents
from training import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT, BATCH = Path(__file__).parent.parent, 16


@pytest.fixture(autouse=True)
def _one_kernel_for_all_runs():
    """Let two runs of the same step be compared bit for bit."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic = False


def training(batch_size, precision="bf16", compiled=False):
    torch.manual_seed(0)
    settings = {"lr": 0.002, "beta1": 0.5, "ema": 0.9, "precision": precision, "seed": 7, "compiled": compiled}
    settings["flip"] = True
    return Trainer(
        Generator(10, 16, 3, 32), Discriminator(16, 3, 32), torch.device("cuda"), **settings, batch_size=batch_size
    )


def batches(count, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=draw) for _ in range(count)]


def assert_close(run, other):
    for name in ("netG", "netD", "netG_ema"):
        ours, theirs = run.state_dict()[name], other.state_dict()[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(run.noise.get_state(), other.noise.get_state())
    assert run.steps == other.steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_equal_plain_ones(precision):
    captured, plain = training(BATCH, precision), training(None, precision)
    for batch in batches(WARM_UP + 4):
        torch.testing.assert_close(captured.step(batch), plain.step(batch), rtol=1e-3, atol=1e-3)
    assert isinstance(captured.whole_step, CapturedStep)
    assert captured.whole_step.graph is not None
    assert_close(captured, plain)
    for optimizer, other in ((captured.optimizerG, plain.optimizerG), (captured.optimizerD, plain.optimizerD)):
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {float(state["step"]) for state in other.state.values()} == {WARM_UP + 4.0}


def test_smaller_batches_between_captured_steps():
    captured, plain = training(BATCH), training(None)
    for batch in batches(WARM_UP + 2) + [batches(1)[0][:5]] + batches(2, seed=4) + [batches(1)[0][:1]] + batches(1):
        captured.step(batch), plain.step(batch)
    assert_close(captured, plain)


def test_continued_after_capture(tmp_path):
    unbroken, first = training(BATCH), training(BATCH)
    for batch in batches(WARM_UP + 6):
        unbroken.step(batch)
    for batch in batches(WARM_UP + 6)[: WARM_UP + 2]:
        first.step(batch)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = training(BATCH)
    for batch in batches(WARM_UP + 1, seed=9):
        second.step(batch)  # captured with tensors that loading replaces
    second.load_state_dict(torch.load(tmp_path / "state.pth", map_location="cpu", weights_only=True))
    for batch in batches(WARM_UP + 6)[WARM_UP + 2 :]:
        second.step(batch)
    assert_close(second, unbroken)


def test_a_state_saved_on_the_gpu_goes_on_without_one():
    run = training(BATCH)
    run.step(batches(1)[0])
    cpu = Trainer(
        Generator(10, 16, 3, 32),
        Discriminator(16, 3, 32),
        torch.device("cpu"),
        lr=0.002,
        beta1=0.5,
        ema=0.9,
        precision="fp32",
        seed=7,
    )
    cpu.load_state_dict(run.state_dict())
    assert cpu.step(batches(1)[0]).isfinite().all()


def test_pictures_kept_on_the_device_come_in_the_same_order():
    rows = np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), np.uint8)
    here, there = PreparedImages(rows, [], []), PreparedImages(rows, [], [])
    there.keep_on(torch.device("cuda"), rows.nbytes * 3 + 3)
    for ours, theirs in zip(here.batches(8, 1, 2), there.batches(8, 1, 2), strict=True):
        assert theirs.is_cuda
        assert torch.equal(ours, theirs.cpu())


def test_pictures_do_not_depend_on_the_batch():
    netG = Generator(10, 16, 3, 32).cuda()
    z = latents(range(200), 10)
    assert torch.equal(generate_images(netG, z)[70:73], generate_images(netG, z[70:73]))


@pytest.mark.slow
def test_compiled_and_captured_steps_are_close_to_plain_ones():
    fast, plain = training(BATCH, "fp32", compiled=True), training(None, "fp32")
    for batch in batches(WARM_UP + 3):
        torch.testing.assert_close(fast.step(batch), plain.step(batch), rtol=1e-2, atol=1e-2)
    assert fast.whole_step.graph is not None


def test_both_commands(tmp_path):
    sizes = ("--dataset", "fake", "--imageSize", "16", "--ngf", "8", "--ndf", "8", "--cache", str(tmp_path / "cache"))
    commands = (
        ("dcgan.py", *sizes, "--cuda", "--niter", "2", "--outf", str(tmp_path / "out")),
        ("dcgan.py", "--cuda", "--niter", "3", "--resume", "--outf", str(tmp_path / "out")),
        ("generate.py", "--cuda", "--load_path", str(tmp_path / "out"), "--outf", str(tmp_path / "made")),
        ("generate.py", "--load_path", str(tmp_path / "out"), "--outf", str(tmp_path / "made-on-the-cpu")),
    )
    for script, *options in commands:
        done = subprocess.run([sys.executable, ROOT / script, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if script == "dcgan.py":
            assert f"precision    {default_precision(torch.device('cuda'))}" in done.stdout
            assert "warning" not in done.stderr
