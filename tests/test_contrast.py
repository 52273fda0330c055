"""support/contrast.py: what D cannot see, the factor that mends it, and that training goes on as without it."""

import math

import numpy as np
import pytest
import torch
from helpers import EXACT, assert_same, checkpoint, equal, log_rows, networks, random_batches, run_dcgan, small_trainer
from PIL import Image
from torch import nn

import dcgan
from data import load_images
from models import Generator, generate_images, latents, load_generator, set_batch_norm_statistics
from support.contrast import LARGEST_FACTOR, contrast_of_data_set, find_contrast_factor, with_contrast_factor


def contrast_of(images):
    """Return the root mean square of the values of uint8 images in units of [-1, 1], in float64."""
    return np.sqrt(np.mean((images.numpy() / 127.5 - 1) ** 2))


def soft_generator(scale=1.0):
    """Return a small generator whose images have a contrast of about 0.3 for a scale of 1."""
    netG = networks()[0].eval()
    set_batch_norm_statistics(netG, [latents(range(256), netG.nz)])
    netG.main[-2].weight.data.mul_(4 * scale)
    return netG


def test_a_discriminator_sees_no_contrast():
    """Plain layers, as in the public example, as they are initialised and in training mode."""
    torch.manual_seed(0)
    layers, channels = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)], 64
    for _ in range(3):
        layers += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * channels)]
        layers, channels = [*layers, nn.LeakyReLU(0.2)], 2 * channels
    netD = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 0, bias=False))
    for layer in netD:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, 0.02)
    x = torch.rand(16, 3, 8, 8).mul(2).sub(1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        logits, paler = netD(x).flatten(), netD(0.7 * x).flatten()
        moved = netD(x + 0.3 * torch.rand_like(x)).flatten()
    assert (paler - logits).abs().max() < 0.03 * (logits.max() - logits.min())
    assert (moved - logits).abs().max() > 0.1 * (logits.max() - logits.min())  # it does see other changes


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.9])
def test_a_contrast_that_is_too_low_is_mended_to_within_a_percent(scale):
    z, pale = latents(range(1024), 10), soft_generator(scale)
    wanted = contrast_of(generate_images(soft_generator(), z))
    factor, before = find_contrast_factor(pale, z, wanted)
    assert before == pytest.approx(contrast_of(generate_images(pale, z)), rel=0.01)
    assert before < 0.95 * wanted
    assert contrast_of(generate_images(with_contrast_factor(pale, factor), z)) == pytest.approx(wanted, rel=0.01)
    assert factor == pytest.approx(1 / scale, rel=0.01)


def test_bright_images_stay_as_bright_as_they_should_be():
    """A larger factor gives them less deviation from their own mean, not more: in the end they are white."""
    z, bright = latents(range(256), 10), soft_generator(0.2)
    bright.main[-2].weight.data.add_(0.08)
    images = generate_images(bright, z)
    assert images.float().mean() > 190
    assert images.float().std() < 50
    pale = with_contrast_factor(bright, 0.9)
    factor, _ = find_contrast_factor(pale, z, contrast_of(images))
    assert factor == pytest.approx(1 / 0.9, rel=0.01)


def test_a_factor_multiplies_what_goes_into_tanh_and_changes_nothing_else():
    netG, z = soft_generator(), latents(range(8), 10)
    before = {name: t.clone() for name, t in netG.state_dict().items()}
    mended = with_contrast_factor(netG, 1.5)
    with torch.no_grad():
        torch.testing.assert_close(mended(z), torch.tanh(1.5 * torch.atanh(netG(z))), rtol=1e-4, atol=1e-5)
    assert equal(netG.state_dict(), before)
    after = mended.state_dict()
    assert [name for name in before if not torch.equal(after[name], before[name])] == ["main.6.weight"]
    torch.testing.assert_close(after["main.6.weight"], 1.5 * before["main.6.weight"])


def test_a_contrast_is_never_lowered_and_the_factor_is_bounded():
    netG, z = soft_generator(), latents(range(64), 10)
    now = contrast_of(generate_images(netG, z))
    for wanted, expected in ((0.5 * now, 1), (now - 0.01, 1), (1.5, LARGEST_FACTOR)):  # 1.5: out of reach
        assert find_contrast_factor(netG, z, wanted)[0] == pytest.approx(expected, rel=1e-3)


def test_finding_a_factor_does_not_depend_on_the_mode_and_keeps_it():
    netG, z = soft_generator(0.5), latents(range(64), 10)
    expected = find_contrast_factor(netG, z, 0.4)
    netG.train()
    assert find_contrast_factor(netG, z, 0.4) == expected
    assert netG.training
    assert netG.main[1].num_batches_tracked == 0


@pytest.mark.parametrize(("size", "count"), [(16, 1500), (128, 40)])
@pytest.mark.parametrize("cache", [True, False])
def test_the_contrast_of_a_data_set_is_that_of_its_images(tmp_path, size, count, cache):
    """Of 1,024 of them, and of large images a part of the pixels: 1% is allowed for that."""
    if cache and count > 100:
        images = load_images("fake", image_size=size, cache=tmp_path)
    else:
        count = min(count, 60)
        blocks = np.random.default_rng(1).integers(0, 256, (count, size // 8, size // 8, 3), dtype=np.uint8)
        for i, block in enumerate(blocks):
            Image.fromarray(block.repeat(8, 0).repeat(8, 1)).save(tmp_path / f"{i}.png")
        images = load_images("folder", tmp_path, size, cache=tmp_path / "cache" if cache else "none")
    everything = torch.cat(list(images.batches(256, seed=5, epoch=3)))
    assert contrast_of_data_set(images) == pytest.approx(contrast_of(everything), rel=0.01)
    assert contrast_of_data_set(images) == contrast_of_data_set(images)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_goes_on_as_without_it(ema):
    with_contrast, twin = small_trainer(ema=ema, target_contrast=0.5), small_trainer(ema=ema)
    for batch in random_batches(3):
        assert torch.equal(with_contrast.step(batch), twin.step(batch))
        found = with_contrast.prepare_sampling(6), twin.prepare_sampling(6)
        assert found[0] < 0.5
        assert found[1] is None
    state, other = with_contrast.state_dict(), twin.state_dict()
    factors = state.pop("contrast_factor"), other.pop("contrast_factor")
    assert factors[0] > 1
    assert factors[1] == 1
    assert (state.pop("target_contrast"), other.pop("target_contrast")) == (0.5, 0)
    assert_same(state, other)
    sampled = twin.netG_ema if ema else twin.netG
    expected = with_contrast_factor(sampled, factors[0]).state_dict()
    assert equal(with_contrast.sampling_generator().state_dict(), expected)
    assert equal(twin.sampling_generator().state_dict(), sampled.state_dict())


def test_a_state_keeps_the_factor_and_those_of_earlier_versions_have_none():
    trainer, other = (small_trainer(seed, target_contrast=0.5) for seed in (0, 3))
    trainer.prepare_sampling(6)
    other.load_state_dict(trainer.state_dict())
    assert equal(other.sampling_generator().state_dict(), trainer.sampling_generator().state_dict())
    switched_off = small_trainer(3)
    switched_off.load_state_dict(trainer.state_dict())
    assert equal(switched_off.sampling_generator().state_dict(), trainer.netG_ema.state_dict())
    earlier = trainer.state_dict()
    del earlier["contrast_factor"]
    other.load_state_dict(earlier)
    assert equal(other.sampling_generator().state_dict(), trainer.netG_ema.state_dict())


@pytest.mark.parametrize("ema", [0.99, 0])
def test_the_weights_to_sample_from_have_the_contrast_and_the_checkpoint_has_not(tmp_path, few_steps, ema):
    runs = {}
    for option in ("--contrast", "--no-contrast"):
        assert run_dcgan(folder := tmp_path / option, *few_steps, "--ema", ema, option) == 0
        runs[option] = folder, checkpoint(folder), log_rows(folder)
    (folder, state, rows), (plain_folder, plain, plain_rows) = runs.values()
    factor = state.pop("contrast_factor")
    assert factor > 1.5
    assert plain["contrast_factor"] == 1
    parts = [part for part in EXACT if part in state]
    assert_same({part: state[part] for part in parts}, {part: plain[part] for part in parts})

    name = "netG_ema" if ema else "netG"
    mended, as_trained = (torch.load(f / f"{name}_epoch_1.pth") for f in (folder, plain_folder))
    assert equal(as_trained, state[name])
    assert [key for key in mended if not torch.equal(mended[key], as_trained[key])] == ["main.6.weight"]
    torch.testing.assert_close(mended["main.6.weight"], factor * as_trained["main.6.weight"])
    for other in {"netG", "netD", name} - {name}:
        assert equal(torch.load(folder / f"{other}_epoch_1.pth"), state[other])
    assert equal(load_generator(folder / "checkpoint.pth").state_dict(), mended)
    assert equal(load_generator(folder / "checkpoint.pth", average=False).state_dict(), state["netG"])

    # In the log, and in the grid of samples
    assert [("contrast" in row) for row in rows] == [False, False, True] * 2
    assert not any("contrast" in row for row in plain_rows)
    images = load_images("folder", few_steps[few_steps.index("--dataroot") + 1], 16, cache=tmp_path / "cache" / "dcgan")
    real = contrast_of(torch.cat(list(images.batches(96, seed=0, epoch=0))))
    netG = Generator(10, 8, 3, 16)
    for weights, expected in ((as_trained, rows[-1]["contrast"] * real), (mended, real)):
        netG.load_state_dict(weights)
        if expected != real or factor < 0.99 * LARGEST_FACTOR:
            assert contrast_of(generate_images(netG, latents(range(1024), 10))) == pytest.approx(expected, rel=0.02)
    grid = np.asarray(Image.open(folder / "fake_samples_epoch_001.png"))
    assert np.array_equal(grid[2:18, 2:18], generate_images(netG, latents(range(64), 10))[0].permute(1, 2, 0))


def test_the_factor_has_no_say_in_data_without_contrast():
    trainer = small_trainer(target_contrast=0.0)
    assert trainer.prepare_sampling(6) is None
    assert trainer.sampling_generator().main[-2].weight.eq(trainer.netG_ema.main[-2].weight).all()


def test_weights_that_are_not_finite_give_no_endless_search():
    netG = soft_generator()
    netG.main[-2].weight.data.fill_(math.nan)
    factor, contrast = find_contrast_factor(netG, latents(range(8), 10), 0.5)
    assert math.isnan(contrast)
    assert math.isfinite(factor)


def test_a_resumed_run_measures_its_images_once(tmp_path, few_steps, monkeypatch):
    """With --cache none, that means decoding a thousand of them."""
    measured = []
    monkeypatch.setattr(dcgan, "contrast_of_data_set", lambda images: measured.append(images) or 0.5)
    for arguments in (few_steps, ["--resume", "--niter", 3], ["--resume", "--niter", 4, "--no-contrast"]):
        assert run_dcgan(tmp_path / "out", *arguments) == 0
        assert checkpoint(tmp_path / "out")["target_contrast"] == (0.0 if "--no-contrast" in arguments else 0.5)
    assert len(measured) == 1
    assert run_dcgan(tmp_path / "out", "--resume", "--niter", 5, "--contrast") == 0
    assert len(measured) == 2
