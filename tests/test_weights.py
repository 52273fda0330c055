"""Weights files: whatever their layers are called they load, and the newest of a folder; bad ones are refused."""

import argparse
import copy
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, equal, networks, random_batches, randomised
from torch import nn

from models import Discriminator, Generator, load_discriminator, load_generator
from support.errors import UserError
from support.weights import read_file
from training import Trainer, TrainerSettings

LOADERS = {"netG": load_generator, "netD": load_discriminator}


# Files of other programs


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


# The newest of a run folder


def run_folder(path, epochs, checkpoint=None, roles=("netG", "netG_ema", "netD")):
    """Write a run folder whose files all hold different weights; return the networks by file and role."""
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


def test_the_plain_weights_are_taken_where_there_is_no_average(tmp_path):
    nets = run_folder(tmp_path, (0,), (1, 5), roles=("netG", "netD"))
    for path, when in ((tmp_path, "checkpoint"), (tmp_path / "netG_epoch_0.pth", 0)):
        assert equal(load_generator(path, average=True).state_dict(), nets[when, "netG"].state_dict())


def test_the_best_average_comes_first(tmp_path):
    nets, best = run_folder(tmp_path, (0, 1), (2, 5)), randomised(Generator(6, 4, 3, 16), 99)
    torch.save(best.state_dict(), tmp_path / "netG_best.pth")
    assert equal(load_generator(tmp_path).state_dict(), best.state_dict())
    assert equal(load_generator(tmp_path, average=False).state_dict(), nets["checkpoint", "netG"].state_dict())
    assert equal(load_discriminator(tmp_path).state_dict(), nets["checkpoint", "netD"].state_dict())


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    nets = run_folder(tmp_path, (0,), (5, 0))
    content = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content[:500])
    assert equal(load_generator(tmp_path).state_dict(), nets[0, "netG_ema"].state_dict())
    (tmp_path / "checkpoint.prev.pth").write_bytes(content)
    assert equal(load_generator(tmp_path).state_dict(), nets["checkpoint", "netG_ema"].state_dict())


# Bad files


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


def scripted(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.script(nn.Conv2d(3, 4, 4)), path)


def exported(path, state):
    program = torch.export.export(nn.Conv2d(3, 4, 4), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def safetensors(path, state):
    header = json.dumps({"main.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def whole_module(path, state, **options):
    torch.save({"epoch": 3, "netG": nn.Conv2d(3, 4, 4)}, path, **options)


REFUSED = {  # what to write at a path, given a good state dict; what the message says
    "runs code": (lambda path, state: torch.save(state | {"extra": Hostile()}, path), "could run code"),
    "plain pickle": (lambda path, state: path.write_bytes(pickle.dumps(Hostile(), 2)), "cannot be read"),
    "TorchScript": (scripted, r"TorchScript program; torch.save the state_dict\(\)"),
    "exported": (exported, "exported program; torch.save the state_dict"),
    "safetensors": (safetensors, "safetensors file; torch.save what"),
    "a whole module": (whole_module, r"save the state_dict\(\) alone"),
    "a whole module, old": (partial(whole_module, _use_new_zipfile_serialization=False), r"save the state_dict\(\)"),
    "truncated": (truncated, "cannot be read"),
    "empty": (lambda path, state: path.write_bytes(b""), "damaged"),
    "a web page": (lambda path, state: path.write_text("<!DOCTYPE html>\n<html>Quota exceeded\n</html>"), "cannot be"),
    "missing": (lambda path, state: None, "no such file"),
    "empty folder": (lambda path, state: path.mkdir(), "no weights"),
    "not finite": (lambda path, state: torch.save(with_nan(state), path), "not finite"),
    "bias": (lambda path, state: torch.save(state | {"main.99.bias": torch.zeros(8)}, path), "is not the"),
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
def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch, role, case):
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


def compressed(path, state):
    """A file of 100 KB that expands to the 100 MB of a generator with 100,000 latents."""
    plain = path.with_suffix(".plain")
    torch.save(state | {next(iter(state)): torch.zeros(100_000, 16, 4, 4)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for part in archive.namelist():
            zipped.writestr(part, archive.read(part))
    plain.unlink()


def expanded(path, state):
    """One number that claims to be the 1 GB of a generator with 1,000,000 latents."""
    huge = torch.ones(1).as_strided((1_000_000, 16, 4, 4), (0, 0, 0, 0))
    torch.save(state | {next(iter(state)): huge}, path)


def cyclic(path, state):
    tree = {"netG": torch.zeros(3), "list": []}
    tree["again"] = {"up": tree}
    torch.save(tree, path)


def deep(path, state):
    tree = {}
    for _ in range(200):
        tree = {"down": tree}
    torch.save(tree, path)


def without_contents(path, state):
    torch.save({name: t.to("meta") for name, t in state.items()}, path)


def sparse(path, state):
    torch.save({name: t.to_sparse() for name, t in state.items()}, path)


def branching(path, state):
    """Twenty dictionaries, through which a million ways lead to weights that do not fit."""
    tree = {name: t for name, t in state.items() if not name.endswith("running_var")}
    for _ in range(20):
        tree = {"left": tree, "right": tree}
    torch.save(tree, path)


HOSTILE = {  # what the message says
    compressed: "it is a compressed archive",
    expanded: "claims to hold larger weights than fit into its",
    cyclic: "is not the generator of a DCGAN",
    deep: "is not the generator of a DCGAN",
    branching: "main.1.running_var is missing",
    without_contents: "is not the generator of a DCGAN",
    sparse: "is not the generator of a DCGAN",
}


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in KB, as Linux does")
def test_hostile_files_are_refused_and_take_no_more_memory_than_their_size(tmp_path):
    paths = [tmp_path / f"{make.__name__}.pth" for make in HOSTILE]
    for make, path in zip(HOSTILE, paths, strict=True):
        make(path, randomised(Generator(10, 8, 3, 16)).state_dict())
        assert path.stat().st_size < 200_000
    program = [sys.executable, ROOT / "tests" / "programs" / "load_generators.py", *paths]
    output = subprocess.check_output(program, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, timeout=100)
    for path, words, (refusal, growth) in zip(paths, HOSTILE.values(), json.loads(output), strict=True):
        assert refusal is not None, path
        assert refusal.startswith(f"{path} ")
        assert words in refusal
        assert "\n" not in refusal
        assert growth < 50_000, path


def test_every_flipped_byte_of_a_checkpoint_is_found_or_does_no_harm(tmp_path):
    trainer, path = Trainer(*networks(), torch.device("cpu"), TrainerSettings()), tmp_path / "checkpoint.pth"
    trainer.step(random_batches(1)[0])
    torch.save(trainer.state_dict() | {"epoch": 1, "options": {"nz": 10, "dataset": "fake"}}, path)
    content, intact = bytearray(path.read_bytes()), read_file(path)
    found, places = 0, random.Random(0).sample(range(len(content)), 300)
    for place in [*places, *range(64), *range(len(content) - 64, len(content))]:
        content[place] ^= 0xFF
        path.write_bytes(content)
        content[place] ^= 0xFF
        try:
            state = read_file(path)
        except UserError:
            found += 1
        else:  # a byte of padding, or of what no reader looks at
            assert set(state) == set(intact)
            for name in ("netG", "netD", "netG_ema"):
                assert all(torch.equal(state[name][key], t) for key, t in intact[name].items())
    assert found > 200
