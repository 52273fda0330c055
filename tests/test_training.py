"""The training step against plain references, and the Trainer: its average, its states, and what it reports."""

import copy
import math

import pytest
import torch
from helpers import NZ, SIZE, assert_same, networks, random_batches, small_trainer, tensors_of
from torch import nn

import training as training_module
from support.accelerator import why_not_compile
from support.errors import UserError
from training import StepAverages, StepResult, bce, train_step, update_ema

BATCH = 6


def adams(nets, lr=0.0002, **settings):
    return [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999), **settings) for net in nets]


# One step


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
    losses = [errD_real + errD_fake, errD_real, errD_fake, errG]
    return [*(loss.item() for loss in losses), D_x, D_G_z1, D_G_z2], gradients


def test_three_steps_equal_the_public_examples():
    # In float64 a gradient near zero, whose sign is all that Adam's first steps use, does not depend on rounding.
    ours = [net.double() for net in networks()]
    theirs = copy.deepcopy(ours)
    our_adams, their_adams = adams(ours, fused=True), adams(theirs, foreach=False)
    first = copy.deepcopy(ours[0].state_dict())
    for batch in random_batches(3):
        real, z = batch.double() / 127.5 - 1, torch.randn(BATCH, NZ).double()
        result = train_step(*ours, *our_adams, real, z)
        assert result._fields == ("loss_D", "loss_D_real", "loss_D_fake", "loss_G", "D_x", "D_G_z1", "D_G_z2")
        expected, gradients = reference_step(*theirs, *their_adams, real, z)
        torch.testing.assert_close(torch.stack(result).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        for p, gradient in zip(ours[1].parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)  # D's own: G's step adds nothing
    for net, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=1e-5)
    assert min((ours[0].state_dict()[n] - t).abs().max() for n, t in first.items() if n.endswith("weight")) > 4e-4


def test_gradients_of_d_and_g_are_their_own():
    """G's step leaves D's gradients as D's update made them, and D's update gives G none."""
    netG, netD = networks()
    optimizers = adams((netG, netD), lr=0.0, fused=True)
    real, z = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1, torch.randn(BATCH, NZ)
    for _ in range(2):  # a second step finds D as the first left it
        train_step(netG, netD, *optimizers, real, z)
        ours = [p.grad.clone() for p in (*netG.parameters(), *netD.parameters())]
        netD.requires_grad_(True)
        loss_D = bce(netD.logits(real), 1) + bce(netD.logits(netG(z).detach()), 0)
        loss_G = bce(netD.logits(netG(z)), 1)  # lr 0: the updated D is the same
        expected = [*torch.autograd.grad(loss_G, netG.parameters()), *torch.autograd.grad(loss_D, netD.parameters())]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", [1, 0])
@pytest.mark.parametrize("logit", [-1000, -90, -20, -6.5, -1, 0, 0.5, 6.5, 20, 90, 1000])
def test_cross_entropy_is_exact_far_from_zero(logit, label, dtype):
    x = torch.tensor([logit], dtype=dtype, requires_grad=True)
    loss = bce(x, label)
    loss.backward()
    # -log sigmoid(x) = log(1 + e^-x), and its slope -1 / (1 + e^x); -log(1 - sigmoid(x)) with the sign of x turned
    x64 = -float(logit) if label else float(logit)
    expected, slope = max(x64, 0) + math.log1p(math.exp(-abs(x64))), math.exp(min(x64, 0)) / (1 + math.exp(-abs(x64)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6 * max(1, abs(logit)))
    relative = 1e-6 if dtype == torch.float32 else 4e-3
    assert x.grad.item() == pytest.approx(-slope if label else slope, abs=1e-6, rel=relative)


def test_cross_entropy_is_the_mean():
    logits = torch.tensor([-1.0, 0.0, 4.0])
    assert bce(logits, 1) == pytest.approx(sum(bce(x, 1) for x in logits.split(1)) / 3)


# The Trainer's steps


def test_bfloat16_stays_close_to_float32():
    results = {}
    for precision in ("fp32", "bf16"):
        trainer = small_trainer(precision=precision)
        results[precision] = torch.stack([trainer.step(batch) for batch in random_batches(5)])
    assert results["bf16"].isfinite().all()
    assert not torch.equal(results["bf16"], results["fp32"])
    torch.testing.assert_close(results["bf16"], results["fp32"], rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_compiled_steps_are_close_to_plain_ones():
    if why_not_compile(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    plain, fast = (small_trainer(lr=0.0002, shard_size=BATCH, compile=compile) for compile in (False, True))
    for batch in [*random_batches(3), *random_batches(1, size=2), *random_batches(2, seed=4)]:
        torch.testing.assert_close(fast.step(batch), plain.step(batch), rtol=1e-4, atol=1e-4)
    for name in ("netG", "netD"):
        for ours, theirs in zip(getattr(fast, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 0.0002)  # Adam turns tiny gradients into whole lr
    batch = random_batches(1)[0]
    torch.testing.assert_close(fast.step(batch)[0], plain.step(batch)[0], rtol=1e-3, atol=1e-3)


def test_mirrored_images_are_what_d_sees(monkeypatch):
    seen = []
    step = training_module.train_step
    monkeypatch.setattr(training_module, "train_step", lambda *a: seen.append(a[4].clone()) or step(*a))
    images = random_batches(1, size=200)[0]
    for flip in (True, True, False):
        small_trainer(lr=0.0, ema=0, flip=flip).step(images)
    mirrored, again, plain = seen
    assert torch.equal(mirrored, again)
    assert torch.equal(plain, images.float() / 127.5 - 1)
    is_plain = [torch.equal(ours, image) for ours, image in zip(mirrored, plain, strict=True)]
    is_mirrored = [torch.equal(ours, image.flip(2)) for ours, image in zip(mirrored, plain, strict=True)]
    assert all(a != b for a, b in zip(is_plain, is_mirrored, strict=True))
    assert 70 < sum(is_mirrored) < 130


def test_a_last_batch_of_one_image_is_finite():
    trainer = small_trainer()
    results = [trainer.step(batch) for batch in random_batches(2) + random_batches(1, size=1)]
    assert torch.stack(results).isfinite().all()
    assert all(t.isfinite().all() for t in tensors_of(trainer.state_dict()).values())


@pytest.mark.parametrize("name", ["netG", "netD", "netG_ema"])
def test_weights_that_are_not_finite_are_found(name):
    trainer = small_trainer()
    trainer.check_finite()
    next(getattr(trainer, name).parameters()).data[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=f"^a weight of {name} is not finite: the run has diverged"):
        trainer.check_finite()


# The moving average, and the statistics of batch norm


def test_average_warms_up_and_then_decays():
    trainer = small_trainer(ema=0.3)
    expected = [p.detach().double().clone() for p in trainer.netG.parameters()]
    for decay, batch in zip((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3), random_batches(6), strict=True):
        trainer.step(batch)
        for i, p in enumerate(trainer.netG.parameters()):
            expected[i] = decay * expected[i] + (1 - decay) * p.detach().double()
    for average, e, p in zip(trainer.netG_ema.parameters(), expected, trainer.netG.parameters(), strict=True):
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


def test_average_does_not_change_the_training():
    trainers = [small_trainer(ema=ema) for ema in (0.0, 0.9)]
    for trainer in trainers:
        for batch in random_batches(4):
            trainer.step(batch)
        trainer.prepare_sampling(BATCH)
    without, with_average = (trainer.state_dict() for trainer in trainers)
    assert "netG_ema" not in without
    assert with_average.pop("netG_ema").keys() == without["netG"].keys()
    assert_same(with_average, without)
    assert [trainer.sampled_name for trainer in trainers] == ["netG", "netG_ema"]


def test_refreshed_statistics_do_not_change_the_training():
    trainer, twin = small_trainer(), small_trainer()
    for batch in random_batches(2):
        trainer.step(batch), twin.step(batch)
    random_state = torch.get_rng_state()
    trainer.prepare_sampling(BATCH)
    assert torch.equal(torch.get_rng_state(), random_state)
    for _ in range(2):  # at once, and after two more steps
        ours, others = (tensors_of(t.state_dict()) for t in (trainer, twin))
        changed = {name for name in others if not torch.equal(ours[name], others[name])}
        running = {n for n in others if n.startswith("/netG") and n.endswith(("running_mean", "running_var"))}
        assert changed == running
        assert len(running) == 8  # two batch norms in each of two generators
        for batch in random_batches(2, seed=4):
            assert torch.equal(trainer.step(batch), twin.step(batch))


# States


@pytest.mark.parametrize(
    ("ema", "precision", "flip"), [(0.0, "fp32", False), (0.9, "fp32", True), (0.9, "bf16", False)]
)
def test_resumed_training_equals_unbroken_training(tmp_path, ema, precision, flip):
    settings = {"ema": ema, "precision": precision, "flip": flip}
    unbroken, first = small_trainer(**settings), small_trainer(**settings)
    for batch in random_batches(5):
        unbroken.step(batch)
    for batch in random_batches(5)[:3]:
        first.step(batch)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = small_trainer(99, **settings)  # other first weights
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for batch in random_batches(5)[3:]:
        second.step(batch)
    assert_same(second.state_dict(), unbroken.state_dict())
    assert unbroken.state_dict()["steps"] == 5


def test_a_state_is_a_copy():
    """It is written while training goes on."""
    trainer = small_trainer()
    trainer.step(random_batches(1)[0])
    state = trainer.state_dict()
    before = copy.deepcopy(state)
    trainer.step(random_batches(1)[0])
    trainer.prepare_sampling(BATCH)
    assert_same(state, before)
    later = trainer.state_dict()
    for part in ("netG", "netD", "netG_ema", "optimizerG", "optimizerD", "noise", "steps"):
        assert any(not torch.equal(t, tensors_of(later)[n]) for n, t in tensors_of(before).items() if part in n), part


def test_weights_in_a_state_are_contiguous_float32():
    state = small_trainer().state_dict()
    for name, t in [item for part in ("netG", "netD", "netG_ema") for item in state[part].items()]:
        assert t.is_contiguous()
        assert t.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert not t.requires_grad


def test_a_state_of_a_gpu_leaves_adam_as_it_is():
    """A checkpoint of an earlier version says that its Adam may be captured, which no CPU's can."""
    trainer, state = small_trainer(), small_trainer().state_dict()
    for name in ("optimizerG", "optimizerD"):
        state[name]["param_groups"][0]["capturable"] = True
    trainer.load_state_dict(state)
    for optimizer in (trainer.optimizerG, trainer.optimizerD):
        assert not any(group["capturable"] for group in optimizer.param_groups)
    assert trainer.step(random_batches(1)[0]).isfinite().all()


def test_a_state_of_a_device_with_another_layout_resumes_the_same(monkeypatch):
    """Adam's moments, of a network in one layout, loaded for one in another: they belong to the same weights."""
    elsewhere, here = small_trainer(), small_trainer()
    for batch in random_batches(3):
        elsewhere.step(batch), here.step(batch)
    monkeypatch.setattr(training_module, "fastest_memory_format", lambda device: torch.contiguous_format)
    other = small_trainer(99)
    other.load_state_dict(elsewhere.state_dict())
    for batch in random_batches(2, seed=4):
        here.step(batch), other.step(batch)
    for ours, theirs in zip(here.netG.parameters(), other.netG.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["of two processes", "of another kind of device"])
def test_noise_that_cannot_be_resumed_begins_anew(noise):
    """From the seed and the step: the same each time, but not the run's first numbers again."""
    trainer = small_trainer()
    for batch in random_batches(2):
        trainer.step(batch)
    state = trainer.state_dict()
    exact = state["noise"][0]
    state["noise"] = [exact, exact] if noise == "of two processes" else [exact[:16]]
    resumed = [small_trainer(99), small_trainer(98)]
    for each in resumed:
        each.load_state_dict(state)
    first, second = (each.state_dict()["noise"][0] for each in resumed)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.Generator().manual_seed(7 + 2).get_state())
    assert_same({"netG": resumed[0].state_dict()["netG"]}, {"netG": state["netG"]})


# What steps report


def test_averages_are_plain_means(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(training_module.time, "perf_counter", lambda: next(clock))
    averages = StepAverages()
    rows = [
        [1.0, 0.25, 0.75, 2.0, 0.5, 0.25, 0.125],
        [2.0, 1.25, 0.75, 4.0, 0.7, 0.35, 0.1],
        [6.0, 4.5, 1.5, 0.0, 0.0, 0.0, 0.0],
    ]
    for row, images in zip(rows, (64, 64, 8), strict=True):
        averages.add(torch.tensor(row), images)
    expected = {"loss_D": 3.0, "loss_D_real": 2.0, "loss_D_fake": 1.0, "loss_G": 2.0}
    expected |= {"D_x": 0.4, "D_G_z1": 0.2, "D_G_z2": 0.075, "images_per_s": 34.0}
    assert averages.compute() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", StepResult._fields)
def test_averages_that_are_not_finite_are_refused(field, value):
    averages = StepAverages()
    averages.add(torch.zeros(7), 1)
    averages.add(torch.tensor(StepResult(*[0.5] * 7)._replace(**{field: value})), 1)
    with pytest.raises(UserError, match="the loss is not finite"):
        averages.compute()
