"""support/augmentation.py: each change against plain loops in NumPy, and training with them."""

import argparse

import numpy as np
import pytest
import torch
from helpers import (
    NZ,
    SIZE,
    assert_same,
    assert_same_run,
    checkpoint,
    networks,
    random_batches,
    run_dcgan,
    small_trainer,
)
from torch import nn

from support.augmentation import CHANGES, Augmentation, change_color, cut_out, ordered_names, translate
from training import train_step

ALL = "color,translation,cutout"
SIZES = (16, 20, 28)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def random_images(count=5, channels=3, size=16):
    return torch.rand(count, channels, size, size, generator=generator(1)) * 2 - 1


# Each change


def color_reference(image, amounts):
    brightness, saturation, contrast = amounts
    image = image + brightness
    grey = sum(image) / len(image)
    image = np.stack([grey + saturation * (channel - grey) for channel in image])
    mean = image.sum() / image.size
    return mean + contrast * (image - mean)


def translation_reference(image, shift):
    moved = np.zeros_like(image)
    for row, column in np.ndindex(image.shape[1:]):
        to = row + shift[0], column + shift[1]
        if 0 <= to[0] < image.shape[1] and 0 <= to[1] < image.shape[2]:
            moved[:, to[0], to[1]] = image[:, row, column]
    return moved


def cutout_reference(image, corner):
    cut, side = image.copy(), image.shape[1] // 2
    for row, column in np.ndindex(side, side):
        at = corner[0] + row, corner[1] + column
        if 0 <= at[0] < image.shape[1] and 0 <= at[1] < image.shape[2]:
            cut[:, at[0], at[1]] = 0
    return cut


REFERENCES = {"color": color_reference, "translation": translation_reference, "cutout": cutout_reference}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_equals_plain_loops(name, channels, size, layout):
    images = random_images(40, channels, size).contiguous(memory_format=layout)
    draw, change = CHANGES[name]
    parameters = draw(images, generator())
    pairs = zip(images.double().numpy(), parameters.double().numpy(), strict=True)
    expected = [REFERENCES[name](image, row if name == "color" else row.astype(int)) for image, row in pairs]
    changed = change(images, parameters)
    assert changed.dtype == torch.float32
    tolerance = 1e-6 if name == "color" else 0
    np.testing.assert_allclose(changed.numpy(), np.stack(expected), rtol=tolerance, atol=tolerance)
    assert torch.equal(Augmentation(name, generator())(images), changed)


def test_changes_that_are_none_leave_the_images():
    images = random_images(1)
    torch.testing.assert_close(change_color(images, torch.tensor([[0.0, 1.0, 1.0]])), images)
    assert torch.equal(translate(images, torch.tensor([[0, 0]])), images)
    assert torch.equal(cut_out(images, torch.tensor([[16, 16]])), images)


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_are_those_of_the_change(name):
    images = random_images(3, size=8).double().requires_grad_()
    draw, change = CHANGES[name]
    parameters = draw(images, generator())
    assert torch.autograd.gradcheck(lambda x: change(x, parameters), images)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_fill_the_papers_ranges(size):
    images = torch.empty(10_000, 3, size, size)
    amounts, shifts, corners = (draw(images, generator()) for draw, _ in CHANGES.values())
    for column, low, high in zip(amounts.T, (-0.5, 0, 0.5), (0.5, 2, 1.5), strict=True):
        assert low <= column.min() < low + 0.01
        assert high - 0.01 < column.max() < high
        assert column.mean() == pytest.approx((low + high) / 2, abs=0.03)
    for column in shifts.T:
        assert sorted(column.unique().tolist()) == list(range(-(size // 8), size // 8 + 1))
    for column in corners.T + size // 4:  # the centre of a square
        assert sorted(column.unique().tolist()) == list(range(size + 1))
    for parameters in (amounts, shifts.double(), corners.double()):  # of each other, and of each image, independent
        assert (torch.corrcoef(parameters.T) - torch.eye(parameters.shape[1])).abs().max() < 0.05


def test_changes_follow_one_another_in_a_fixed_order():
    images, noise = random_images(), generator()
    expected = images
    for draw, change in CHANGES.values():
        expected = change(expected, draw(images, noise))
    augment = Augmentation(ALL, generator())
    assert torch.equal(augment(images), expected)
    assert not torch.equal(augment(images), expected)  # with new parameters
    assert Augmentation("none")(images) is images


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", "none"), ("color", "color"), ("cutout,color", "color,cutout"), ("cutout,translation,color", ALL)],
)
def test_names_are_put_in_order(text, names):
    assert ordered_names(text) == names


@pytest.mark.parametrize("text", ["", "colour", "color,", "color,none", "color cutout", "Color", "col"])
def test_other_names_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="color, translation, cutout, separated by commas, not "):
        ordered_names(text)


# Training


def plain_step(netG, netD, optimizerG, optimizerD, real, z, changes):
    """Take the paper's step; changes: what is done to the real and the fake images of D's update, and to G's."""
    criterion, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(len(real)), torch.zeros(len(real))
    change_real, change_fake, change_for_G = changes
    netD.requires_grad_(True)
    optimizerD.zero_grad()
    fake = netG(z)
    real_logits = netD.logits(change_real(real))
    fake_logits = netD.logits(change_fake(fake.detach()))
    (criterion(real_logits, ones) + criterion(fake_logits, zeros)).backward()
    optimizerD.step()
    netD.requires_grad_(False)
    optimizerG.zero_grad()
    criterion(netD.logits(change_for_G(fake)), ones).backward()
    optimizerG.step()


@pytest.mark.parametrize("names", ["none", ALL])
def test_three_steps_equal_plain_ones_bit_for_bit(names):
    """Each of the three times that D sees images has parameters of its own, from the trainer's random numbers."""

    def change(images):
        for name, (draw, changed) in CHANGES.items():
            images = changed(images, draw(images, noise)) if name in names else images
        return images

    trainer, plain, noise = small_trainer(augment=names), small_trainer(), generator(7)
    plain_parts = plain.netG, plain.netD, plain.optimizerG, plain.optimizerD
    for batch in random_batches(3):
        trainer.step(batch)
        real = batch.contiguous(memory_format=torch.channels_last).float().div(127.5).sub(1)
        plain_step(*plain_parts, real, torch.randn(len(batch), NZ, generator=noise), [change] * 3)
    ours, expected = trainer.state_dict(), plain.state_dict()
    assert_same({name: ours[name] for name in ("netG", "netD")}, {name: expected[name] for name in ("netG", "netD")})
    assert torch.equal(trainer.rng.get_state(), noise.get_state())


def test_a_step_does_not_augment_unless_it_is_told_to():
    steps = []
    for augment in ({}, {"augment": Augmentation()}):
        nets = networks()
        adams = [torch.optim.Adam(net.parameters()) for net in nets]
        real, z = random_images(size=SIZE), torch.randn(5, NZ, generator=generator())
        steps.append([*train_step(*nets, *adams, real, z, **augment), *nets[0].parameters(), *nets[1].parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*steps, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("names", [*CHANGES, ALL])
def test_resumed_training_equals_unbroken_training(names, precision):
    settings = {"augment": names, "precision": precision}
    unbroken, first, second = small_trainer(**settings), small_trainer(**settings), small_trainer(99, **settings)
    results = [unbroken.step(batch) for batch in random_batches(4)]
    again = [first.step(batch) for batch in random_batches(4)[:2]]
    second.load_state_dict(first.state_dict())
    again += [second.step(batch) for batch in random_batches(4)[2:]]
    assert_same(again, results)
    assert torch.stack(results).isfinite().all()
    assert_same(second.state_dict(), unbroken.state_dict())


def test_a_run_depends_on_the_seed_and_resumes_exactly(tmp_path, few_steps, capsys):
    one, two, plain = (tmp_path / name for name in ("one", "two", "plain"))
    assert run_dcgan(one, *few_steps, "--augment", "cutout,color") == 0
    assert "  --augment     color,cutout\n" in capsys.readouterr().out
    assert run_dcgan(two, *few_steps, "--augment", "color,cutout", "--niter", 1) == 0
    assert run_dcgan(two, "--resume", "--niter", 2) == 0
    assert_same_run(two, one)
    assert run_dcgan(plain, *few_steps) == 0
    assert not torch.equal(*(checkpoint(folder)["netD"]["main.0.weight"] for folder in (one, plain)))
