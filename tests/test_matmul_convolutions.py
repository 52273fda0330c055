"""The innermost convolutions as matrix products: equal to convolutions, and used while training in float32 alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import randomised
from torch import nn

from models import Discriminator, Generator
from support import matmul_convolutions
from support.matmul_convolutions import MatmulConv2d, MatmulConvTranspose2d, as_matmul, use_matmul_convolutions
from training import Trainer, TrainerSettings, train_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("side", [4, 5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_matrix_products_equal_convolutions(kind, side, stride, layout):
    """In float64, with their gradients and the gradients of these; bit for bit in eval mode."""
    kernel, small, large = (side, 1, side) if stride == 1 else (4, side, 2 * side)
    points = small if kind is nn.ConvTranspose2d else large
    layer = kind(3, 5, kernel, stride, stride - 1, bias=False).double().to(memory_format=layout)
    product = as_matmul(layer)
    assert isinstance(product, MatmulConv2d | MatmulConvTranspose2d)
    x = torch.randn(2, 3, points, points).double().contiguous(memory_format=layout).requires_grad_()
    results = []
    for each in (layer.train(), product.train(), copy.copy(product).eval()):
        y = each(x)
        gradients = torch.autograd.grad(y.pow(3).sum(), (x, each.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, each.weight))
        results.append([t.detach() for t in (y, *gradients, *second)])
    expected, training, sampling = results
    torch.testing.assert_close(training, expected, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sampling, expected, strict=True))


def test_a_step_with_matrix_products_equals_one_without(monkeypatch):
    monkeypatch.setattr(matmul_convolutions, "is_intel", lambda: True)
    torch.manual_seed(0)
    nets = Generator().double(), Discriminator().double()
    real, z, gradients = torch.rand(4, 3, 64, 64).double(), torch.randn(4, 100).double(), []
    for products in (False, True):
        netG, netD = (copy.deepcopy(net).to(memory_format=torch.channels_last) for net in nets)
        if products:
            use_matmul_convolutions(netG, CPU), use_matmul_convolutions(netD, CPU)
        adams = [torch.optim.Adam(net.parameters(), lr=0.0, fused=True) for net in (netG, netD)]
        result = train_step(netG, netD, *adams, real, z)
        gradients.append([torch.stack(result), *(p.grad for net in (netG, netD) for p in net.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_networks_keep_their_weights_and_names(kind):
    net = randomised(kind()).eval()
    weights, state = list(net.parameters()), copy.deepcopy(net.state_dict())
    use_matmul_convolutions(net, CPU)
    assert all(ours is weight for ours, weight in zip(net.parameters(), weights, strict=True))
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[name], t) for name, t in state.items())
    assert not any(layer.training for layer in net.modules())


def test_on_cuda_only_the_innermost_layer_is_a_product(monkeypatch):
    monkeypatch.setattr(matmul_convolutions, "is_intel", lambda: True)
    for net, kind, place in ((Generator(), MatmulConvTranspose2d, 0), (Discriminator(), MatmulConv2d, -2)):
        use_matmul_convolutions(net, torch.device("cuda"))
        assert [layer for layer in net.main if isinstance(layer, kind)] == [list(net.main)[place]]


@pytest.mark.parametrize(("maker", "products"), [("GenuineIntel", 2), ("AuthenticAMD", 1), (None, 1)])
def test_innermost_layers_are_matrix_products_while_training(monkeypatch, maker, products):
    """Two of each of the default networks on Intel, otherwise one; none of the average, in bfloat16, or compiled."""

    def read_text(path):
        assert path == "/proc/cpuinfo"
        if maker is None:  # no Linux
            raise FileNotFoundError
        return f"processor\t: 0\nvendor_id\t: {maker}\n"

    monkeypatch.setattr(matmul_convolutions, "Path", lambda path: SimpleNamespace(read_text=lambda: read_text(path)))

    def count(ngf, size, **settings):
        nets = Generator(10, ngf, 3, size), Discriminator(ngf, 3, size)
        trainer = Trainer(*nets, CPU, TrainerSettings(**settings))
        of_G, of_average, of_D = (map(type, net.main) for net in (trainer.netG, trainer.netG_ema, trainer.netD))
        assert MatmulConvTranspose2d not in of_average
        return list(of_G).count(MatmulConvTranspose2d), list(of_D).count(MatmulConv2d)

    assert count(64, 64) == (products, products)
    assert count(16, 64) == count(64, 56) == (1, 1)
    assert count(64, 64, precision="bf16") == count(64, 64, compile=True) == (0, 0)
