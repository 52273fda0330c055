"""The networks against the paper's numbers and the public PyTorch example, the images they generate, and batch norm."""

import copy

import numpy as np
import pytest
import torch
from helpers import equal, public_discriminator, public_generator, randomised
from torch import nn

from models import Discriminator, Generator, generate_images, latents, set_batch_norm_statistics
from support.errors import UserError
from support.image_sizes import IMAGE_SIZES

# First map and channels (as multiples of ngf or ndf) of the hidden maps, counted by hand.
LAYERS = {
    16: (4, [2, 1]),
    28: (7, [2, 1]),
    64: (4, [8, 4, 2, 1]),
    80: (5, [8, 4, 2, 1]),
    128: (4, [16, 8, 4, 2, 1]),
    1024: (4, [16, 16, 16, 16, 8, 4, 2, 1]),
}


def public_weights_init(module):
    if module.__class__.__name__.find("Conv") != -1:
        torch.nn.init.normal_(module.weight, 0.0, 0.02)
    elif module.__class__.__name__.find("BatchNorm") != -1:
        torch.nn.init.normal_(module.weight, 1.0, 0.02)
        torch.nn.init.zeros_(module.bias)


# Shapes, sizes, counts


def test_image_sizes_are_the_closed_list():
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
    ends = 16 * channels[-1] * nc  # the layer next to the image
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
    assert p.std() > 0  # it depends on the image


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


# Generated images


def test_a_latent_vector_depends_on_its_seed_alone():
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
    """A generator whose images use the whole range, so that the last bits of its arithmetic can show."""
    netG = randomised(Generator(20, 8, 3, 32)).eval()
    netG.main[-2].weight.data.mul_(50)
    return netG


@pytest.fixture
def two_threads():
    """With these, the last bits of a convolution depend on the size of its batch: 3 and 64 images differ here."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def generate_with_floats(netG, z):
    """Return the images of z, and the floats that the network gave for them before they were rounded."""
    outputs = []
    handle = netG.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    uint8 = generate_images(netG, z)
    handle.remove()
    return uint8, torch.cat(outputs)[: len(z)]  # the last block may be padded


@pytest.mark.parametrize("count", [1, 3, 7, 33, 64, 65, 130])
def test_an_image_depends_on_its_latent_vector_alone(vivid, two_threads, count):
    z = latents(range(130), 20)
    everything = generate_with_floats(vivid, z)
    assert everything[0].float().std() > 50
    for seeds in (range(count), [count - 1], range(129, -1, -1)):
        images = generate_with_floats(vivid, z[list(seeds)])
        assert all(torch.equal(a, b[list(seeds)]) for a, b in zip(images, everything, strict=True))


def test_an_image_does_not_depend_on_the_layout_of_the_weights(vivid, two_threads):
    """Weights that were trained are in channels-last, those from a file are contiguous."""
    z = latents(range(5), 20)
    contiguous, trained = copy.deepcopy(vivid), copy.deepcopy(vivid)
    contiguous.to(memory_format=torch.contiguous_format), trained.to(memory_format=torch.channels_last)
    images = [generate_with_floats(netG, z) for netG in (contiguous, trained)]
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))


@pytest.mark.parametrize(("size", "block"), [(16, 64), (64, 64), (128, 16), (512, 1), (1024, 1)])
def test_larger_images_are_generated_in_smaller_blocks(size, block):
    netG, seen = Generator(2, 1, 1, size), []
    netG.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert generate_images(netG, latents(range(2), 2)).shape == (2, 1, size, size)
    assert seen == [block] * (2 if block == 1 else 1)


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_network_as_it_was(vivid, training):
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


def test_statistics_are_those_of_all_latent_vectors():
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
    assert lag < 0.2  # images generated alone look like those of training
