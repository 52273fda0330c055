"""The networks against the paper's numbers and the public PyTorch example, their files, and the pictures they make."""

import argparse
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import (
    IMAGE_SIZES,
    Discriminator,
    Generator,
    load_discriminator,
    load_generator,
    set_batch_norm_statistics,
)
from support.errors import UserError
from support.latents import latents

torch.set_num_threads(1)  # with more, networks this small wait for each other on a busy machine
LOADERS = {"netG": load_generator, "netD": load_discriminator}
# First map and channels (as multiples of ngf, or ndf) of the hidden maps, counted by hand.
LAYERS = {
    16: (4, [2, 1]),
    28: (7, [2, 1]),
    64: (4, [8, 4, 2, 1]),
    80: (5, [8, 4, 2, 1]),
    128: (4, [16, 8, 4, 2, 1]),
    1024: (4, [16, 16, 16, 16, 8, 4, 2, 1]),
}


class Public(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)


def public_generator(nz, ngf, nc):
    """Return the generator of pytorch/examples dcgan/main.py, layer for layer."""
    layers = [nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True)]
    return Public([*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()])


def public_discriminator(ndf, nc):
    """Return the discriminator of pytorch/examples dcgan/main.py, layer for layer; its output is (N, 1, 1, 1)."""
    layers = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 2), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 4), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 8), nn.LeakyReLU(0.2)]
    return Public([*layers, nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()])


def public_weights_init(module):
    if module.__class__.__name__.find("Conv") != -1:
        torch.nn.init.normal_(module.weight, 0.0, 0.02)
    elif module.__class__.__name__.find("BatchNorm") != -1:
        torch.nn.init.normal_(module.weight, 1.0, 0.02)
        torch.nn.init.zeros_(module.bias)


def randomised(net, seed=0):
    """Return the network with other values in every tensor, so that no two layers can be mistaken for each other."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        kernel = tensor.dim() == 4
        values = torch.randn(tensor.shape, generator=draw) * 0.1 if kernel else torch.rand(tensor.shape, generator=draw)
        tensor.copy_(values if kernel else values + 1)  # a variance is positive
    return net


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


# Shapes, sizes, counts


def test_sizes_are_the_closed_list():
    expected = (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
    assert expected + (640, 768, 896, 1024) == IMAGE_SIZES


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_shapes(size):
    with torch.device("meta"):
        netG, netD = Generator(5, 2, 3, size), Discriminator(2, 3, size)
        for z in (torch.empty(2, 5), torch.empty(2, 5, 1, 1)):
            assert netG(z).shape == (2, 3, size, size)
        assert netD(torch.empty(2, 3, size, size)).shape == netD.logits(torch.empty(2, 3, size, size)).shape == (2,)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(65, "64 and 80"), (17, "16 and 20"), (36, "32 and 40"), (15, "16"), (8, "16"), (1025, "1024"), (2048, "1024")],
)
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_other_sizes_are_refused_naming_the_nearest(kind, size, nearest):
    with pytest.raises(UserError, match=rf"{size} is not possible.*: {nearest} \(") as refusal:
        kind(image_size=size)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", LAYERS)
def test_parameters_are_as_many_as_counted_by_hand(size):
    (b, channels), nz, nc, n = LAYERS[size], 10, 3, 4
    channels = [n * c for c in channels]
    hidden = sum(16 * c_in * c_out for c_in, c_out in zip(channels, channels[1:], strict=False))
    ends = 16 * channels[-1] * nc  # the layer next to the picture
    with torch.device("meta"):
        netG, netD = Generator(nz, n, nc, size), Discriminator(n, nc, size)
    counts = [sum(p.numel() for p in net.parameters()) for net in (netG, netD)]
    assert counts[0] == b * b * nz * channels[0] + hidden + ends + 2 * sum(channels)
    assert counts[1] == b * b * channels[0] + hidden + ends + 2 * sum(channels[:-1])


def test_parameters_of_the_papers_networks():
    counts = [sum(p.numel() for p in net().parameters()) for net in (Generator, Discriminator)]
    assert counts == [3_576_704, 2_765_568]


# The same networks as the public example's


@pytest.mark.parametrize(
    ("ours", "public"),
    [(Generator(20, 8, 3, 64), public_generator(20, 8, 3)), (Discriminator(8, 3, 64), public_discriminator(8, 3))],
)
def test_weights_go_to_the_public_example_and_back(ours, public):
    shapes = [{name: t.shape for name, t in net.state_dict().items()} for net in (ours, public)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    x = torch.randn((5, 20, 1, 1) if isinstance(ours, Generator) else (5, 3, 64, 64))
    for source, target, seed in ((ours, public, 1), (public, ours, 2)):
        target.load_state_dict(randomised(source, seed).state_dict())
        for train in (True, False):  # training first: it changes both networks' statistics
            assert torch.equal(ours.train(train)(x).flatten(), public.train(train)(x).flatten())


def test_same_seed_same_first_weights_as_the_public_example():
    torch.manual_seed(5)
    public = [
        public_generator(20, 8, 3).apply(public_weights_init),
        public_discriminator(8, 3).apply(public_weights_init),
    ]
    torch.manual_seed(5)
    ours = [Generator(20, 8, 3, 64), Discriminator(8, 3, 64)]
    assert all(equal(a.state_dict(), b.state_dict()) for a, b in zip(ours, public, strict=True))
    torch.manual_seed(6)
    assert not equal(Generator(20, 8, 3, 64).state_dict(), ours[0].state_dict())


@pytest.mark.parametrize("size", [16, 28, 64, 80])
def test_probability_is_the_sigmoid_of_the_logit(size):
    netD = randomised(Discriminator(8, 3, size)).eval()
    x = torch.rand(6, 3, size, size) * 2 - 1
    p, logits = netD(x), netD.logits(x)
    assert p.shape == logits.shape == (6,)
    assert torch.equal(p, torch.sigmoid(logits))
    assert ((p >= 0) & (p <= 1)).all()
    assert p.std() > 0  # it looks at the picture


@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_first_weights_have_the_papers_distribution(kind):
    torch.manual_seed(0)
    for module in kind().modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            w, mean = module.weight.detach().double(), float(isinstance(module, nn.BatchNorm2d))
            assert abs(w.mean() - mean) < 5 * 0.02 / w.numel() ** 0.5  # five standard errors
            assert abs(w.std() / 0.02 - 1) < 5 / (2 * w.numel()) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            assert not module.bias.any()


# Weights files


def numbered(state):
    """Name the layers as other implementations do: tconv1.weight, bn1.weight, bn1.bias, ..., tconv2.weight, ..."""
    layers = {True: [], False: []}  # convolutions, batch norms
    renamed = {}
    for name, tensor in state.items():
        _, layer, field = name.split(".")
        of_its_kind = layers[tensor.dim() == 4]
        of_its_kind += [layer] if layer not in of_its_kind else []
        renamed[f"{'tconv' if tensor.dim() == 4 else 'bn'}{len(of_its_kind)}.{field}"] = tensor
    return renamed


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def trained_adam(net):
    """Return the state of an Adam that has taken a step: its moments have the shapes of the weights."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), amsgrad=True)
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def nested(netG, netD):
    settings = {"nz": 100, "lr": 2e-4, "beta1": 0.5, "nepochs": 10}
    states = {"generator": netG.state_dict(), "discriminator": netD.state_dict()}
    optimizers = {"optimizerG": trained_adam(netG), "optimizerD": trained_adam(netD)}
    return optimizers | states | {"params": settings, "opt": argparse.Namespace(**settings), "epoch": 3}


NAMINGS = {  # what is saved, from the networks (netG, netD) and the state dict of the one that will be asked for
    "ours": lambda nets, state: state,
    "data parallel": lambda nets, state: prefixed(state, "module."),
    "compiled": lambda nets, state: prefixed(state, "_orig_mod."),
    "other sequential": lambda nets, state: {n.replace("main.", "structure."): t for n, t in state.items()},
    "numbered layers": lambda nets, state: numbered(state),
    "norms last": lambda nets, state: dict(sorted(numbered(state).items(), key=lambda item: item[1].dim() != 4)),
    "nested": lambda nets, state: nested(*nets),
    "nested data parallel": lambda nets, state: {"models": {n: prefixed(s, "module.") for n, s in both(nets).items()}},
    "both in one": lambda nets, state: {f"{n}.{k}": t for n, s in both(nets).items() for k, t in s.items()},
    "half": lambda nets, state: {n: t.half() if t.is_floating_point() else t for n, t in state.items()},
    "no counts": lambda nets, state: {n: t for n, t in state.items() if "num_batches" not in n},
    "strided": lambda nets, state: {
        n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in state.items()
    },
}


def both(nets):
    return {name: net.state_dict() for name, net in zip(("generator", "discriminator"), nets, strict=True)}


@pytest.mark.parametrize("role", LOADERS)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("nz", "n", "nc", "size"), [(10, 8, 3, 16), (4, 4, 1, 28), (7, 3, 3, 80), (12, 2, 1, 128)])
def test_weights_load_whatever_they_are_called(tmp_path, role, naming, nz, n, nc, size):
    nets = randomised(Generator(nz, n, nc, size), 1), randomised(Discriminator(n + 1, nc, size), 2)
    net = nets[role == "netD"]
    torch.save(NAMINGS[naming](nets, net.state_dict()), tmp_path / "weights.pth")
    random_state = torch.get_rng_state()
    loaded = LOADERS[role](tmp_path / "weights.pth")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(loaded) is type(net)
    assert not loaded.training
    sizes = ("nz", "ngf", "nc", "image_size") if role == "netG" else ("ndf", "nc", "image_size")
    assert [getattr(loaded, size) for size in sizes] == [getattr(net, size) for size in sizes]
    for name, t in net.state_dict().items():
        expected = t.half().float() if naming == "half" and t.is_floating_point() else t
        expected = torch.tensor(0) if naming == "no counts" and name.endswith("num_batches_tracked") else expected
        assert torch.equal(loaded.state_dict()[name], expected), name
        assert loaded.state_dict()[name].dtype == t.dtype
        assert loaded.state_dict()[name].is_contiguous()


def run_folder(path, epochs, checkpoint=None, roles=("netG", "netG_ema", "netD")):
    """Write a run folder in which every file's weights are told apart; return the networks by file and role."""
    nets = {}
    for role in ("netG", "netG_ema", "netD"):
        make = (lambda: Discriminator(4, 3, 16)) if role == "netD" else (lambda: Generator(6, 4, 3, 16))
        for when in (*epochs, "checkpoint"):
            nets[when, role] = randomised(make(), len(nets))
            if when != "checkpoint" and role in roles:
                torch.save(nets[when, role].state_dict(), path / f"{role}_epoch_{when}.pth")
    if checkpoint:
        state = {role: nets["checkpoint", role].state_dict() for role in roles}
        optimizers = {"optimizerG": trained_adam(nets["checkpoint", "netG"])}
        position = {"epoch": checkpoint[0], "step": checkpoint[1], "options": {"ema": 0.999}}
        torch.save(optimizers | state | position, path / "checkpoint.pth")
    return nets


@pytest.mark.parametrize(
    ("epochs", "checkpoint", "newest"),
    [
        ((0, 1), None, 1),
        ((2, 9, 10, 100), None, 100),  # by number, not by name
        ((2, 9, 10), None, 10),
        ((9, 10), (11, 0), None),  # as old as the last epoch's files: either will do, see below
        ((9, 10), (11, 3), "checkpoint"),  # three steps further
        ((9,), (12, 0), "checkpoint"),  # --save-every
        ((9, 10), (4, 5), 10),
        ((), (0, 5), "checkpoint"),
    ],
)
def test_newest_weights_of_a_run_folder(tmp_path, epochs, checkpoint, newest):
    nets = run_folder(tmp_path, epochs, checkpoint)
    loaded = {
        "netG": load_generator(tmp_path, average=False),
        "netG_ema": load_generator(tmp_path, average=True),
        "netD": load_discriminator(tmp_path),
    }
    for role, net in loaded.items():
        candidates = [newest] if newest is not None else ["checkpoint", max(epochs)]
        assert any(equal(net.state_dict(), nets[when, role].state_dict()) for when in candidates), role


def test_average_or_plain_where_the_other_is_not_there(tmp_path):
    nets = run_folder(tmp_path, (0,), (1, 5), roles=("netG", "netD"))
    for path, when in ((tmp_path, "checkpoint"), (tmp_path / "netG_epoch_0.pth", 0)):
        assert equal(load_generator(path, average=True).state_dict(), nets[when, "netG"].state_dict())


def test_damaged_checkpoint_beside_whole_weights(tmp_path):
    nets = run_folder(tmp_path, (0,), (5, 0))
    (tmp_path / "checkpoint.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes()[:500])
    assert equal(load_generator(tmp_path).state_dict(), nets[0, "netG_ema"].state_dict())


class Hostile:
    """When unpickled, makes a folder called "ran" in the current folder."""

    def __reduce__(self):
        return Path.mkdir, (Path("ran"),)


def truncated(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def with_nan(state):
    last = max(name for name, t in state.items() if t.dim() == 4)
    return state | {last: torch.full_like(state[last], float("nan"))}


def reshaped(state):
    last = max(name for name, t in state.items() if t.dim() == 4)
    return state | {last: state[last][..., :-1]}


REFUSED = {  # what to write at a path, given a good state dict; what the message says
    "runs code": (lambda path, state: torch.save(state | {"extra": Hostile()}, path), "could run code"),
    "plain pickle": (lambda path, state: path.write_bytes(pickle.dumps(Hostile(), 2)), "cannot be read"),
    "truncated": (truncated, "cannot be read"),
    "empty": (lambda path, state: path.write_bytes(b""), "damaged"),
    "a web page": (lambda path, state: path.write_text("<!DOCTYPE html>\n<html>Quota exceeded\n</html>"), "cannot be"),
    "missing": (lambda path, state: None, "no such file"),
    "empty folder": (lambda path, state: path.mkdir(), "no weights"),
    "not finite": (lambda path, state: torch.save(with_nan(state), path), "not finite"),
    "bias": (lambda path, state: torch.save(state | {"main.0.bias": torch.zeros(8)}, path), "is not the"),
    "extra layer": (lambda path, state: torch.save(state | {"main.99.weight": torch.zeros(3, 3)}, path), "is not the"),
    "extra 4-d": (
        lambda path, state: torch.save(state | {"main.99.weight": torch.zeros(3, 3, 4, 4)}, path),
        "is not the",
    ),
    "a layer less": (lambda path, state: torch.save(dict(list(state.items())[1:]), path), "is not the"),
    "other shape": (lambda path, state: torch.save(reshaped(state), path), "is not the"),
    "whole numbers": (lambda path, state: torch.save({n: t.long() for n, t in state.items()}, path), "is not the"),
    "a tensor": (lambda path, state: torch.save(torch.zeros(3), path), "is not the"),
    "a list": (lambda path, state: torch.save([1, "two"], path), "is not the"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("role", LOADERS)
def test_bad_files_are_refused_in_error_text(tmp_path, monkeypatch, role, case):
    monkeypatch.chdir(tmp_path)
    write, words = REFUSED[case]
    net = Generator(10, 8, 3, 16) if role == "netG" else Discriminator(8, 3, 16)
    write(tmp_path / "weights.pth", randomised(net).state_dict())
    with pytest.raises(UserError, match=words) as refusal:
        LOADERS[role](tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("load", "net", "words"),
    [
        (load_generator, Discriminator(8, 3, 16), "it holds a discriminator"),
        (load_discriminator, Generator(10, 8, 3, 16), "it holds a generator"),
    ],
)
def test_swapped_networks_are_refused_by_name(tmp_path, load, net, words):
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "weights.pth")


# Pictures


def test_latents_depend_on_their_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    z = latents(range(3000), 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(latents([2999, 7, 0], 20), z[[2999, 7, 0]])
    assert len(z.unique(dim=0)) == 3000
    # N(0, 1), and neighbouring seeds have nothing in common: all within five standard errors
    error = 5 / z.numel() ** 0.5
    assert abs(z.mean()) < error
    assert abs(z.std() - 1) < error
    assert abs((z[1:] * z[:-1]).mean()) < error


@pytest.fixture(scope="module")
def vivid():
    """A generator whose pictures use the whole range, so that the last bits of its arithmetic can show."""
    netG = randomised(Generator(20, 8, 3, 32)).eval()
    netG.main[-2].weight.data.mul_(50)
    return netG


@pytest.fixture
def two_threads():
    """With these, the last bits of a convolution depend on the size of its batch: 3 and 64 pictures differ here."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def shown(netG, z):
    """Return the pictures of z, and the floats that the network gave for them before they were rounded."""
    outputs = []
    handle = netG.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    uint8 = generate_images(netG, z)
    handle.remove()
    return uint8, torch.cat(outputs)[: len(z)]  # the last block may be filled up


@pytest.mark.parametrize("count", [1, 3, 7, 33, 64, 65, 130])
def test_picture_depends_on_its_latent_alone(vivid, two_threads, count):
    z = latents(range(130), 20)
    everything = shown(vivid, z)
    assert everything[0].float().std() > 50
    for seeds in (range(count), [count - 1], range(129, -1, -1)):
        assert all(
            torch.equal(a, b[list(seeds)]) for a, b in zip(shown(vivid, z[list(seeds)]), everything, strict=True)
        )


@pytest.mark.parametrize("training", [True, False])
def test_pictures_leave_the_network_as_it_was(vivid, training):
    netG = copy.deepcopy(vivid).train(training)
    uint8 = generate_images(netG, latents(range(3), 20))
    assert all(module.training == training for module in netG.modules())
    assert equal(netG.state_dict(), vivid.state_dict())
    assert torch.equal(uint8, generate_images(vivid, latents(range(3), 20)))


def test_values_are_rounded_to_the_nearest_of_256():
    class Echo(nn.Module):
        nz, image_size = 256, 16

        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.zeros(1))

        def forward(self, z):
            return z.reshape(-1, 1, 16, 16)

    levels = torch.arange(256)
    for shift in (-0.4, 0.0, 0.4):
        value = ((levels + shift) / 127.5 - 1).clamp(-1, 1)
        uint8 = generate_images(Echo(), value[None])
        assert uint8.dtype == torch.uint8
        assert torch.equal(uint8.flatten(), levels.to(torch.uint8))


# Batch-norm statistics


def test_statistics_are_those_of_all_the_noise():
    netG = randomised(Generator(10, 8, 3, 32))
    noise = torch.randn(6, 16, 10, generator=torch.Generator().manual_seed(1))
    twin, inputs = copy.deepcopy(netG).train(), {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            collected = inputs[name] = []
            module.register_forward_pre_hook(lambda _, args, to=collected: to.append(args[0].detach().numpy().copy()))
    trained = torch.cat([twin(z) for z in noise])  # each batch by its own statistics
    before, random_state = copy.deepcopy(netG.state_dict()), torch.get_rng_state()
    set_batch_norm_statistics(netG, noise)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(inputs) == 3
    after = netG.state_dict()
    for name, batches in inputs.items():
        values = np.concatenate(batches).astype(np.float64)
        np.testing.assert_allclose(after[f"{name}.running_mean"], values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[f"{name}.running_var"], values.var((0, 2, 3)), rtol=1e-5)
    assert all(torch.equal(after[name], t) for name, t in before.items() if not name.startswith(tuple(inputs)))
    assert all(torch.equal(after[name], t) for name, t in before.items() if ".running_" not in name)
    lag = (netG.eval()(noise.flatten(0, 1)) - trained).std() / trained.std()
    assert lag < 0.2  # pictures made alone look like those of training
