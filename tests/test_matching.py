"""Weights of other programs: what loads computes what its own program computes; what differs is refused, or said."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, assert_refused, equal, networks, run_dcgan, run_generate
from torch import nn

import generate
from models import Discriminator, Generator, latents, load_discriminator, load_generator
from support.errors import UserError


class OtherGenerator(nn.Module):
    """A generator as other programs write it: named layers with biases, activations in `forward`; 32 x 32 images."""

    def __init__(self, nz=7, n=4, nc=3, bias=True, norm=nn.BatchNorm2d, kernels=(4, 4, 4, 4)):
        super().__init__()
        channels, last = [nz, 4 * n, 2 * n, n, nc], len(kernels) - 1
        for i, kernel in enumerate(kernels):
            stride, padding = (2, (kernel - 1) // 2) if i else (1, 0)
            layer = nn.ConvTranspose2d(channels[i], channels[i + 1], kernel, stride, padding, bias=bias and i < last)
            setattr(self, f"tconv{i}", layer)
            if i < last and norm:
                setattr(self, f"bn{i}", norm(channels[i + 1]))

    def forward(self, z):
        x = z.view(len(z), -1, 1, 1)
        for i in range(3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"tconv{i}")(x)))
        return torch.tanh(self.tconv3(x))


class OtherDiscriminator(nn.Module):
    """The discriminator for OtherGenerator, in blocks, with biases in the layers before batch norm."""

    def __init__(self, n=4, nc=3, first_bias=False):
        super().__init__()
        self.enter = nn.Conv2d(nc, n, 4, 2, 1, bias=first_bias)
        self.block1 = nn.ModuleDict({"conv": nn.Conv2d(n, 2 * n, 4, 2, 1), "bn": nn.BatchNorm2d(2 * n)})
        self.block2 = nn.ModuleDict({"conv": nn.Conv2d(2 * n, 4 * n, 4, 2, 1), "bn": nn.BatchNorm2d(4 * n)})
        self.leave = nn.Conv2d(4 * n, 1, 4, 1, 0, bias=False)

    def forward(self, x):
        x = F.leaky_relu(self.enter(x), 0.2)
        for block in (self.block1, self.block2):
            x = F.leaky_relu(block["bn"](block["conv"](x)), 0.2)
        return torch.sigmoid(self.leave(x)).flatten()


def filled(net, seed=0):
    """Return the network with random values in every tensor, so that each of them matters."""
    torch.manual_seed(seed)
    for name, t in net.state_dict().items():
        if t.is_floating_point():
            kernel = t.dim() == 4
            t.copy_(torch.randn(t.shape) * 0.2 if kernel else torch.rand(t.shape) + 0.5)
        if name.endswith("bias"):
            t.mul_(2).sub_(1)
    return net


CASES = {
    "generator": (load_generator, lambda: OtherGenerator(), (16, 7)),
    "grey": (load_generator, lambda: OtherGenerator(nz=3, n=2, nc=1), (16, 3)),
    "without biases": (load_generator, lambda: OtherGenerator(bias=False), (16, 7)),
    "discriminator": (load_discriminator, lambda: OtherDiscriminator(), (6, 3, 32, 32)),
}


def saved(folder, state):
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


# What loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_loads_computes_what_its_own_program_computes(tmp_path, case, dtype):
    load, make, shape = CASES[case]
    other = filled(make()).to(dtype).eval()
    loaded, x = load(saved(tmp_path, other.state_dict())), torch.randn(shape)
    with torch.no_grad():
        expected, outputs = other.double()(x.double()), loaded(x)
    assert expected.std() > 0.05  # it depends on the input
    torch.testing.assert_close(outputs.double(), expected.view_as(outputs), rtol=0, atol=1e-5)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_with_the_biases(tmp_path, case):
    """Batch norm takes its batch's mean away, and a bias with it: values, gradients and later statistics are equal."""
    load, make, shape = CASES[case]
    other = filled(make()).double()
    loaded, x = load(saved(tmp_path, other.state_dict())).double(), torch.randn(shape).double()
    outputs = [net.train()(x) for net in (loaded, other)]
    torch.testing.assert_close(outputs[0], outputs[1].view_as(outputs[0]), rtol=0, atol=1e-6)
    gradients = []
    for net, y in zip((loaded, other), outputs, strict=True):
        y.square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.dim() == 4])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    y = [net.eval()(x).detach() for net in (loaded, other)]  # the running means have moved
    torch.testing.assert_close(y[0], y[1].view_as(y[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)]
)
def test_more_forms_that_load(tmp_path, norm):
    other = filled(OtherGenerator(norm=norm)).eval()
    expected = other(latents(range(5), 7))
    state = other.state_dict()
    forms = {
        "parameters": other.state_dict(keep_vars=True),
        "averaged": torch.optim.swa_utils.AveragedModel(other).state_dict(),
        "a zero bias in the last layer": state | {"tconv3.bias": torch.zeros(3)},
    }
    for form, state in forms.items():
        loaded = copy.deepcopy(load_generator(saved(tmp_path, state)))
        torch.testing.assert_close(loaded(latents(range(5), 7)), expected, rtol=0, atol=1e-5, msg=form)


@pytest.mark.parametrize(
    ("average", "plain"),
    [
        ("netG_ema", "netG"),
        ("ema", "schema"),
        ("G_ema", "cinema"),
        ("ema_generator", "scheman"),
        ("generatorEMA", "SCHEMA"),
        ("netGEma", "SCHEMA"),
        ("emaG", "demand"),
    ],
)
def test_the_average_is_found_by_a_word_of_its_key(tmp_path, average, plain):
    states = {name: networks(seed)[0].state_dict() for seed, name in enumerate((plain, average))}
    for names in ((plain, average), (average, plain)):
        path = saved(tmp_path, {name: states[name] for name in names})
        assert equal(load_generator(path, average=True).state_dict(), states[average])
        assert equal(load_generator(path, average=False).state_dict(), states[plain])


# What is said

G_NOTE = "batch norm with eps 1e-5, then ReLU; tanh at the end; stride 1 and padding 0 in the first layer, then 2 and 1"


@pytest.mark.parametrize(
    "naming",
    ["main.", "module.main.", "_orig_mod.main.", "netG.main.", "main.module.", "main._orig_mod.", "module.netG.main."],
)
def test_names_of_the_public_example_need_no_note(tmp_path, capsys, naming):
    state = networks()[0].state_dict()
    load_generator(saved(tmp_path, {name.replace("main.", naming): t for name, t in state.items()}))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("case", ["other names", "another number", "a bias"])
def test_what_was_assumed_is_said_in_one_line(tmp_path, capsys, case):
    state = networks()[0].state_dict()
    states = {
        "other names": OtherGenerator(bias=False).state_dict(),
        "another number": {name.replace("main.6", "main.7"): t for name, t in state.items()},
        "a bias": state | {"main.0.bias": torch.ones(16)},
    }
    path = saved(tmp_path, states[case])
    load_generator(path)
    output, errors = capsys.readouterr()
    assert (output.count("\n"), errors) == (1, "")
    assert output.startswith(f"note: {path}: ")
    assert G_NOTE in output


def test_what_was_assumed_of_a_discriminator(tmp_path, capsys):
    load_discriminator(saved(tmp_path, OtherDiscriminator().state_dict()))
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "LeakyReLU(0.2); sigmoid at the end" in output


def test_both_programs_take_weights_of_others(tmp_path, isolated, capsys):
    """G's conv biases go into the statistics, which training replaces; only the note tells a run from another."""
    torch.manual_seed(0)
    path = saved(tmp_path, OtherGenerator(nz=10, n=8).state_dict())
    generated = run_generate(path, "--num_output", 2)
    assert (generated / "seed000001.png").exists()
    assert capsys.readouterr().out.count("its layers are not named as") == 1
    sizes = SMALL.replace("16", "32").split()
    assert run_dcgan(tmp_path / "run", *sizes, "--netG", path, "--dry-run", "--workers", 0) == 0
    assert capsys.readouterr().out.count("its layers are not named as") == 1


# What is refused


def projected():
    """A generator that projects with a fully connected layer, then upsamples and convolves."""
    layers = [nn.Linear(7, 8 * 16), nn.Unflatten(1, (8, 4, 4)), nn.BatchNorm2d(8)]
    for c_in, c_out in ((8, 8), (8, 4), (4, 3)):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers)


def with_last_bias(net, value=0.1):
    state = net.state_dict()
    last = [name for name, t in state.items() if t.dim() == 4][-1]
    return state | {last.replace("weight", "bias"): torch.full((3,), value)}


def without(state, *ends):
    return {name: t for name, t in state.items() if not name.endswith(ends)}


def trained(net):
    optimizer = torch.optim.Adam(net.parameters(), amsgrad=True)
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def other(**options):
    return OtherGenerator(**options).state_dict()


def public(**extra):
    """Return a generator's state dict with other tensors: main_3_weight is main.3.weight."""
    return networks()[0].state_dict() | {name.replace("_", ".", 2): t for name, t in extra.items()}


G, D = load_generator, load_discriminator
NORMS = torch.nn.utils.parametrizations
REFUSED = {  # the loader, what makes the state, words of the message
    "kernel 5": (G, lambda: other(kernels=(4, 5, 5, 5)), ("tconv1.weight", "16 x 8 x 5 x 5", "16 x 8 x 4 x 4")),
    "first kernel 3": (G, lambda: other(kernels=(3, 4, 4, 4)), ("tconv0.weight", "16 x 3 x 3", "7 x 16 x 4 x 4")),
    "first kernel 1": (G, lambda: other(kernels=(1, 4, 4, 4)), ("tconv0.weight", "16 x 1 x 1", "7 x 16 x 4 x 4")),
    "first kernel 8": (G, lambda: other(kernels=(8, 4, 4, 4)), ("tconv0.weight", "16 x 8 x 8", "7 x 16 x 7 x 7")),
    "last kernel 1": (G, lambda: other(kernels=(4, 4, 4, 1)), ("tconv3.weight", "4 x 3 x 1 x 1", "4 x 3 x 4 x 4")),
    "two layers": (G, lambda: other(kernels=(4, 4)), ("2 convolutions", "3")),
    "width": (
        G,
        lambda: public(main_3_weight=torch.ones(16, 9, 4, 4)),
        ("main.3.weight", "16 x 9 x", "16 x 8 x 4 x 4"),
    ),
    "too large": (
        G,
        lambda: {f"{i}.weight": torch.ones(2, 2, 5, 5) for i in range(9)},
        ("9 con", "1280 x 1280", "1024 x 1024"),
    ),
    "far too large": (G, lambda: {f"{i}.weight": torch.ones(1, 1, 4, 4) for i in range(20_000)}, ("20,000 con", "9")),
    "bias at the end": (G, lambda: with_last_bias(OtherGenerator()), ("tconv3.bias", "no batch norm")),
    "a last bias of nan": (G, lambda: with_last_bias(OtherGenerator(), torch.nan), ("tconv3.bias",)),
    "bias at D's start": (D, lambda: OtherDiscriminator(first_bias=True).state_dict(), ("enter.bias", "no batch norm")),
    "bias of length 1": (G, lambda: public(main_0_bias=torch.ones(1)), ("main.0.bias has the shape 1, wanted 16",)),
    "no norm": (G, lambda: other(norm=None), ("0 batch norms with running statistics", "3")),
    "instance norm": (G, lambda: other(norm=nn.InstanceNorm2d), ("0 batch norms with running",)),
    "no statistics": (G, lambda: other(norm=partial(nn.BatchNorm2d, track_running_stats=False)), ("0 batch norms",)),
    "no affine": (G, lambda: other(norm=partial(nn.BatchNorm2d, affine=False)), ("bn0.weight", "missing")),
    "no variance": (G, lambda: without(other(), "bn1.running_var"), ("bn1.running_var", "missing")),
    "norm's width": (G, lambda: public(main_4_weight=torch.ones(5)), ("main.4.weight has the shape 5, wanted 8",)),
    "old spectral norm": (D, lambda: normalised(nn.utils.spectral_norm), ("enter.weight_orig", "spectral")),
    "spectral norm": (D, lambda: normalised(NORMS.spectral_norm), ("enter.parametrizations.weight", "spectral")),
    "weight norm": (D, lambda: normalised(NORMS.weight_norm), ("enter.parametrizations.weight", "weight norm")),
    "old weight norm": (
        G,
        lambda: {n.replace("0.weight", "0.weight_g"): t for n, t in other().items()},
        ("0.weight_g",),
    ),
    "projection": (G, lambda: projected().state_dict(), ("0.weight", "128 x 7", "fully connected")),
    "labels": (G, lambda: other() | {"embedding.weight": torch.ones(10, 7)}, ("embedding.weight", "10 x 7")),
    "prelu": (G, lambda: public(main_2_weight=torch.ones(1)), ("main.2.weight", "no place")),
    "attention": (G, lambda: other() | {"attention.gamma": torch.zeros(())}, ("attention.gamma", "no place")),
    "whole numbers": (G, lambda: public(main_1_weight=torch.ones(16).long()), ("main.1.weight", "int64")),
    "nothing in it": (G, lambda: public(main_0_weight=torch.ones(1 << 40, 0, 4, 4)), ("main.0.weight", "empty")),
    "no convolutions": (G, lambda: nn.Linear(3, 4).state_dict(), ("no weights of convolutions",)),
    "swapped": (D, other, ("holds a generator",)),
    "swapped, a bias": (G, lambda: OtherDiscriminator(first_bias=True).state_dict(), ("holds a discriminator",)),
    "beside D": (G, lambda: nested(OtherGenerator(kernels=(4, 4, 5, 4))), ("tconv2.weight", "8 x 4 x 5 x 5")),
    "in one with D": (G, lambda: flat(OtherGenerator(kernels=(4, 4, 5, 4))), ("g.tconv2.weight", "8 x 4 x 5 x 5")),
    "in one with D, the first": (G, lambda: flat(OtherGenerator(kernels=(4, 5, 4, 4))), ("g.tconv1.weight",)),
    "beside an optimizer": (G, lambda: {"o": trained(OtherGenerator()), "g": other(norm=None)}, ("0 batch norms",)),
}


def nested(netG):
    return {"d": OtherDiscriminator().state_dict(), "g": netG.state_dict()}


def flat(netG):
    return nn.ModuleDict({"g": netG, "d": OtherDiscriminator()}).state_dict()


def normalised(normalise):
    net = OtherDiscriminator()
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d):
            normalise(module)
    return net.state_dict()


@pytest.mark.parametrize("case", REFUSED)
def test_the_first_difference_is_named(tmp_path, capsys, case):
    load, make, words = REFUSED[case]
    path = saved(tmp_path, make())
    with pytest.raises(UserError) as refusal:
        load(path)
    text = str(refusal.value)
    assert text.startswith(f"{path} is not the {'generator' if load is G else 'discriminator'} of a DCGAN: ")
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    assert capsys.readouterr() == ("", "")


def test_programs_refuse_in_one_line(tmp_path, isolated, capsys):
    path = saved(tmp_path, with_last_bias(OtherGenerator(nz=10, n=8)))
    assert_refused(lambda: generate.main(["--load_path", str(path)]), capsys, "tconv3.bias")
    sizes = SMALL.replace("16", "32").split()
    assert_refused(lambda: run_dcgan(tmp_path / "run", *sizes, "--netG", path), capsys, "tconv3.bias")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"imsize": 64}, "imsize 64"),
        ({"opt": {"imageSize": 28}}, "imageSize 28"),
        ({"args": generate.build_parser().parse_args([]), "config": {"img_size": 64}}, "img_size 64"),
        ({"params": {"nz": 5}}, "nz 5"),  # and labels beside the latent vector
        ({"params": {"latent_dim": 5}}, "latent_dim 5"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(tmp_path, settings, words):
    path = saved(tmp_path, {"generator": OtherGenerator().state_dict()} | settings)
    with pytest.raises(UserError, match=words) as refusal:
        load_generator(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"params": {"nz": 7, "imsize": 32, "lr": 2e-4}},
        {"imageSize": 32, "config": {"img_size": [64, 64], "nz": None, "z_dim": "100"}},
        {"options": {"image_size": 32, "nz": 7}, "pictures": 100},
    ],
)
def test_other_settings_do_not_matter(tmp_path, settings):
    states = {"generator": OtherGenerator().state_dict(), "discriminator": OtherDiscriminator().state_dict()}
    path = saved(tmp_path, states | settings)
    assert isinstance(load_generator(path), Generator)
    assert isinstance(load_discriminator(path), Discriminator)
