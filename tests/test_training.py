"""One step, its sums and averages, against plain references; and what a saved state must hold."""

import copy
import math
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dcgan
import training as training_module
from dcgan import StepAverages
from models import Discriminator, Generator
from support.accelerator import default_precision, why_not_compile
from support.cpu_convolutions import MatmulConv2d, MatmulConvTranspose2d, use_matmul_convolutions
from support.errors import UserError
from support.signals import StopSignal
from training import Trainer, bce, runner, train_step, update_ema

NZ, SIZE, BATCH = 10, 16, 6
torch.set_num_threads(1)  # with more, networks this small wait for each other on a busy machine


def networks(seed=0):
    torch.manual_seed(seed)
    return Generator(NZ, 8, 3, SIZE), Discriminator(8, 3, SIZE)


def training(seed=0, ema=0.9, precision="fp32", flip=False):
    settings = {"lr": 0.002, "beta1": 0.5, "ema": ema, "precision": precision, "seed": 7, "flip": flip}
    run = Trainer(*networks(seed), torch.device("cpu"), **settings)
    return multiplied(run) if precision == "fp32" else run


def multiplied(run):
    """Let both innermost layers be matrix products, as they are in wider networks."""
    run.netG.main[3].__class__, run.netD.main[2].__class__ = MatmulConvTranspose2d, MatmulConv2d
    return run


def batches(count, size=BATCH, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw) for _ in range(count)]


def tensors_of(tree, name=""):
    """Return {path: tensor} of all that a nested state holds; None becomes -1."""
    if not isinstance(tree, dict | list | tuple):
        return {name: torch.as_tensor(-1.0 if tree is None else tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: t for key, value in items for path, t in tensors_of(value, f"{name}/{key}").items()}


def assert_same(state, expected):
    state, expected = tensors_of(state), tensors_of(expected)
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert different == []


def reference_step(netG, netD, optimizerG, optimizerD, real, z):
    """Take the step of pytorch/examples dcgan/main.py: probabilities, one backward pass per batch of D's."""
    criterion, ones, zeros = nn.BCELoss(), torch.ones(len(real)), torch.zeros(len(real))
    netD.zero_grad()
    output = netD(real)
    errD_real = criterion(output, ones.to(output))
    errD_real.backward()
    D_x = output.mean().item()
    fake = netG(z[:, :, None, None])
    output = netD(fake.detach())
    errD_fake = criterion(output, zeros.to(output))
    errD_fake.backward()
    D_G_z1 = output.mean().item()
    optimizerD.step()
    gradients = [p.grad.clone() for p in netD.parameters()]

    netG.zero_grad()
    output = netD(fake)
    errG = criterion(output, ones.to(output))
    errG.backward()
    D_G_z2 = output.mean().item()
    optimizerG.step()
    return [(errD_real + errD_fake).item(), errG.item(), D_x, D_G_z1, D_G_z2], gradients


def test_three_steps_equal_the_public_examples():
    # In float64 a gradient near zero, whose sign is all that Adam's first steps use, does not hang on rounding.
    ours = [net.double() for net in networks()]
    theirs = copy.deepcopy(ours)
    adams = [torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999), fused=True) for net in ours]
    plain = [torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999), foreach=False) for net in theirs]
    first = copy.deepcopy(ours[0].state_dict())
    for pictures in batches(3):
        real, z = pictures.double() / 127.5 - 1, torch.randn(BATCH, NZ).double()
        statistics = train_step(*ours, *adams, real, z, runner(real.device, "fp32"))
        expected, gradients = reference_step(*theirs, *plain, real, z)
        torch.testing.assert_close(statistics.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        for p, gradient in zip(ours[1].parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)  # D's own: G's step adds nothing
    for net, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=1e-5)
    assert min((ours[0].state_dict()[n] - t).abs().max() for n, t in first.items() if n.endswith("weight")) > 4e-4


def test_bfloat16_stays_close_to_float32():
    statistics = {
        p: torch.stack([t.step(b) for b in batches(5)]) for p in ("fp32", "bf16") for t in [training(0, 0.9, p)]
    }
    assert statistics["bf16"].isfinite().all()
    assert not torch.equal(statistics["bf16"], statistics["fp32"])
    torch.testing.assert_close(statistics["bf16"], statistics["fp32"], rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_compiled_steps_are_close_to_plain_ones():
    if why_not_compile(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    nets = [networks(), networks()]
    settings = {"lr": 0.0002, "beta1": 0.5, "ema": 0.9, "precision": "fp32", "seed": 7, "batch_size": BATCH}
    plain, fast = (
        Trainer(*net, torch.device("cpu"), **settings, compiled=compiled)
        for net, compiled in zip(nets, (False, True), strict=True)
    )
    for batch in [*batches(3), *batches(1, size=2), *batches(2, seed=4)]:
        torch.testing.assert_close(fast.step(batch), plain.step(batch), rtol=1e-4, atol=1e-4)
    for name in ("netG", "netD"):
        for ours, theirs in zip(getattr(fast, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 0.0002)  # Adam turns tiny gradients into whole lr
    torch.testing.assert_close(fast.step(batches(1)[0])[0], plain.step(batches(1)[0])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("plain", "product"), [(nn.Conv2d, MatmulConv2d), (nn.ConvTranspose2d, MatmulConvTranspose2d)])
@pytest.mark.parametrize("side", [4, 5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_multiplied_convolutions_are_convolutions(plain, product, side, stride, layout):
    """In float64, with their gradients and those of these; bit for bit where they do not train."""
    kernel, small, large = (side, 1, side) if stride == 1 else (4, side, 2 * side)
    points = small if product is MatmulConvTranspose2d else large
    layer = plain(3, 5, kernel, stride, stride - 1, bias=False).double().to(memory_format=layout)
    x = torch.randn(2, 3, points, points).double().contiguous(memory_format=layout).requires_grad_()
    results = []
    for kind, train in ((plain, True), (product, True), (product, False)):
        layer.__class__ = kind
        y = layer.train(train)(x)
        gradients = torch.autograd.grad(y.pow(3).sum(), (x, layer.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, layer.weight))
        results.append([t.detach() for t in (y, *gradients, *second)])
    expected, training, sampling = results
    torch.testing.assert_close(training, expected, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sampling, expected, strict=True))


def test_a_step_with_multiplied_layers_equals_one_without():
    torch.manual_seed(0)
    nets = Generator().double(), Discriminator().double()
    real, z, gradients = torch.rand(4, 3, 64, 64).double(), torch.randn(4, 100).double(), []
    for multiplied in (False, True):
        netG, netD = (copy.deepcopy(net).to(memory_format=torch.channels_last) for net in nets)
        if multiplied:
            use_matmul_convolutions(netG), use_matmul_convolutions(netD)
        adams = [torch.optim.Adam(net.parameters(), lr=0.0, fused=True) for net in (netG, netD)]
        statistics = train_step(netG, netD, *adams, real, z, runner(real.device, "fp32"))
        gradients.append([statistics, *(p.grad for net in (netG, netD) for p in net.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_innermost_layers_are_multiplied_while_training():
    """Two of each of the paper's networks, one of smaller ones; none of the average, in bfloat16, or compiled."""

    def count(ngf, size, **other):
        nets = Generator(10, ngf, 3, size), Discriminator(ngf, 3, size)
        run = Trainer(
            *nets, torch.device("cpu"), lr=0.0002, beta1=0.5, ema=0.9, seed=0, **({"precision": "fp32"} | other)
        )
        of_G, of_average, of_D = (map(type, net.main) for net in (run.netG, run.netG_ema, run.netD))
        assert MatmulConvTranspose2d not in of_average
        return list(of_G).count(MatmulConvTranspose2d), list(of_D).count(MatmulConv2d)

    assert count(64, 64) == (2, 2)
    assert count(16, 64) == count(64, 56) == (1, 1)
    assert count(64, 64, precision="bf16") == count(64, 64, compiled=True) == (0, 0)


def test_gradients_of_d_and_g_are_their_own():
    """G's step leaves D's gradients as D's update made them, and D's update gives G none."""
    netG, netD = networks()
    adams = [torch.optim.Adam(net.parameters(), lr=0.0, fused=True) for net in (netG, netD)]
    real, z = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1, torch.randn(BATCH, NZ)
    for _ in range(2):  # a second step finds D as the first left it
        train_step(netG, netD, *adams, real, z, runner(torch.device("cpu"), "fp32"))
        ours = [p.grad.clone() for p in (*netG.parameters(), *netD.parameters())]
        netD.requires_grad_(True)
        loss_D = bce(netD.logits(real), real=True) + bce(netD.logits(netG(z).detach()), real=False)
        loss_G = bce(netD.logits(netG(z)), real=True)  # lr 0: the updated D is the same
        expected = [*torch.autograd.grad(loss_G, netG.parameters()), *torch.autograd.grad(loss_D, netD.parameters())]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_state_of_another_device_keeps_this_ones_way():
    """A checkpoint of a GPU says that its Adam may be captured, which no CPU's can."""
    run, state = training(), copy.deepcopy(training().state_dict())
    for name in ("optimizerG", "optimizerD"):
        state[name]["param_groups"][0]["capturable"] = True
    run.load_state_dict(state)
    assert run.step(batches(1)[0]).isfinite().all()


def test_state_of_a_device_with_another_layout_goes_on_the_same(monkeypatch):
    """Adam's moments, of a network in one layout, loaded for one in another: they belong to the same weights."""
    elsewhere, here = training(), training()
    for batch in batches(3):
        elsewhere.step(batch), here.step(batch)
    monkeypatch.setattr(training_module, "fastest_layout", lambda device: torch.contiguous_format)
    other = training(99)
    other.load_state_dict(elsewhere.state_dict())
    for batch in batches(2, seed=4):
        here.step(batch), other.step(batch)
    for ours, theirs in zip(here.netG.parameters(), other.netG.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_default_precision_of_a_cpu():
    assert default_precision(torch.device("cpu")) == "fp32"


FAULTS = """
import itertools, resource, statistics, torch, training, models
from support import accelerator
if {tuned}:
    accelerator.tune(torch.device("cpu"))
nets = models.Generator(image_size=48), models.Discriminator(image_size=48)
run = training.Trainer(*nets, torch.device("cpu"), lr=1e-4, beta1=0.5, ema=0, precision="fp32", seed=0)
batch = torch.zeros(128, 3, 48, 48, dtype=torch.uint8)
counts = [run.step(batch) is None or resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(10)]
print(statistics.median(after - before for before, after in itertools.pairwise(counts[3:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives buffers back")
def test_freed_buffers_are_kept():
    """A step takes thousands of new pages from the system, unless freed buffers are kept."""
    root = Path(__file__).parent.parent
    faults = {
        tuned: float(subprocess.check_output([sys.executable, "-c", FAULTS.format(tuned=tuned)], cwd=root, text=True))
        for tuned in (False, True)
    }
    assert faults[True] < faults[False] / 10


def test_mirrored_pictures_are_what_d_sees(monkeypatch):
    seen = []
    step = training_module.train_step
    monkeypatch.setattr(training_module, "train_step", lambda *a: seen.append(a[4].clone()) or step(*a))
    pictures = batches(1, size=200)[0]
    for flip in (True, True, False):
        nets, settings = networks(), {"lr": 0.0, "beta1": 0.5, "ema": 0, "precision": "fp32", "seed": 7}
        Trainer(*nets, torch.device("cpu"), **settings, flip=flip).step(pictures)
    mirrored, again, plain = seen
    assert torch.equal(mirrored, again)
    assert torch.equal(plain, pictures.float() / 127.5 - 1)
    is_plain = [torch.equal(ours, picture) for ours, picture in zip(mirrored, plain, strict=True)]
    is_mirrored = [torch.equal(ours, picture.flip(2)) for ours, picture in zip(mirrored, plain, strict=True)]
    assert all(a != b for a, b in zip(is_plain, is_mirrored, strict=True))
    assert 70 < sum(is_mirrored) < 130


def test_last_batch_of_one_is_finite():
    run = training()
    statistics = [run.step(batch) for batch in batches(2) + batches(1, size=1)]
    assert torch.stack(statistics).isfinite().all()
    assert all(t.isfinite().all() for t in tensors_of(run.state_dict()).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("logit", [-1000, -90, -20, -6.5, -1, 0, 0.5, 6.5, 20, 90, 1000])
def test_cross_entropy_is_exact_far_from_zero(logit, real, dtype):
    x = torch.tensor([logit], dtype=dtype, requires_grad=True)
    loss = bce(x, real=real)
    loss.backward()
    # -log sigmoid(x) = log(1 + e^-x), and its slope -1 / (1 + e^x); -log(1 - sigmoid(x)) with the sign of x turned
    x64 = -float(logit) if real else float(logit)
    expected, slope = max(x64, 0) + math.log1p(math.exp(-abs(x64))), math.exp(min(x64, 0)) / (1 + math.exp(-abs(x64)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6 * max(1, abs(logit)))
    assert x.grad.item() == pytest.approx(
        -slope if real else slope, abs=1e-6, rel=1e-6 if dtype == torch.float32 else 4e-3
    )


def test_cross_entropy_is_the_mean():
    logits = torch.tensor([-1.0, 0.0, 4.0])
    assert bce(logits, real=True) == pytest.approx(sum(bce(x, real=True) for x in logits.split(1)) / 3)


def test_average_warms_up_and_then_decays():
    run = training(ema=0.3)
    expected = [p.detach().double().clone() for p in run.netG.parameters()]
    for decay, batch in zip((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3), batches(6), strict=True):
        run.step(batch)
        for i, p in enumerate(run.netG.parameters()):
            expected[i] = decay * expected[i] + (1 - decay) * p.detach().double()
    for average, e, p in zip(run.netG_ema.parameters(), expected, run.netG.parameters(), strict=True):
        torch.testing.assert_close(average.double(), e, rtol=1e-6, atol=1e-7)
        assert not torch.equal(average, p)
        assert not average.requires_grad


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 5.0), (0.25, 4.0), (1.0, 1.0)])
def test_average_moves_by_one_minus_the_decay(decay, expected):
    average, net = networks()[0], networks()[0]
    for parameters, value in ((average.parameters(), 1.0), (net.parameters(), 5.0)):
        for p in parameters:
            nn.init.constant_(p, value)
    update_ema(average, net, torch.tensor(1 - decay))
    assert all((p == expected).all() for p in average.parameters())
    assert all((p == 5).all() for p in net.parameters())


def test_average_does_not_touch_the_training():
    runs = [training(ema=ema) for ema in (0.0, 0.9)]
    for run in runs:
        for batch in batches(4):
            run.step(batch)
        run.refresh_statistics(BATCH)
    without, with_average = (run.state_dict() for run in runs)
    assert "netG_ema" not in without
    assert with_average.pop("netG_ema").keys() == without["netG"].keys()
    assert_same(with_average, without)


def test_true_statistics_do_not_touch_the_training():
    run, twin = training(), training()
    for batch in batches(2):
        run.step(batch), twin.step(batch)
    random_state = torch.get_rng_state()
    run.refresh_statistics(BATCH)
    assert torch.equal(torch.get_rng_state(), random_state)
    for _ in range(2):  # at once, and after two more steps
        ours, others = (tensors_of(copy.deepcopy(r.state_dict())) for r in (run, twin))
        changed = {name for name in others if not torch.equal(ours[name], others[name])}
        running = {n for n in others if n.startswith("/netG") and n.endswith(("running_mean", "running_var"))}
        assert changed == running
        assert len(running) == 8  # two batch norms in each of two generators
        for batch in batches(2, seed=4):
            assert torch.equal(run.step(batch), twin.step(batch))


@pytest.mark.parametrize(
    ("ema", "precision", "flip"), [(0.0, "fp32", False), (0.9, "fp32", True), (0.9, "bf16", False)]
)
def test_continued_training_equals_unbroken_training(tmp_path, ema, precision, flip):
    unbroken, first = training(0, ema, precision, flip), training(0, ema, precision, flip)
    for batch in batches(5):
        unbroken.step(batch)
    for batch in batches(5)[:3]:
        first.step(batch)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = training(99, ema, precision, flip)  # other first weights
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for batch in batches(5)[3:]:
        second.step(batch)
    assert_same(second.state_dict(), unbroken.state_dict())
    assert unbroken.state_dict()["steps"] == 5


def test_saved_weights_are_contiguous_float32():
    state = training().state_dict()
    for name, t in [item for part in ("netG", "netD", "netG_ema") for item in state[part].items()]:
        assert t.is_contiguous()
        assert t.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert not t.requires_grad


def test_meter_reads_plain_means(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(dcgan.time, "perf_counter", lambda: next(clock))
    meter = StepAverages()
    rows = [[1.0, 2.0, 0.5, 0.25, 0.125], [2.0, 4.0, 0.7, 0.35, 0.1], [6.0, 0.0, 0.0, 0.0, 0.0]]
    for row, images in zip(rows, (64, 64, 8), strict=True):
        meter.add(torch.tensor(row), images)
    expected = {"loss_D": 3.0, "loss_G": 2.0, "D_x": 0.4, "D_G_z1": 0.2, "D_G_z2": 0.075, "images_per_s": 34.0}
    assert meter.read() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_meter_refuses_what_is_not_finite(value):
    meter = StepAverages()
    meter.add(torch.zeros(5), 1)
    meter.add(torch.tensor([0.5, value, 0.5, 0.5, 0.5]), 1)
    with pytest.raises(UserError, match="not finite"):
        meter.read()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_first_signal_waits_and_the_second_ends_all(name):
    signum = getattr(signal, name)
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.received == 0
        signal.raise_signal(signum)
        assert stop.received == signum
        assert signal.getsignal(signum) == signal.SIG_DFL
    assert signal.getsignal(signum) == before
