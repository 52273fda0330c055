"""Both programs on a simulated accelerator, to find on any machine what would fail only on a GPU."""

import csv
import functools
import io
import shutil
import signal

import pytest
import simulated
import torch
from helpers import write_images
from torch import nn

import dcgan
import generate
import models
import training
from support.fid import FidMeter

# All names of the program's internals that these tests use.
TRAINER = training.Trainer
PLAIN_CONVOLUTIONS = (training, "use_matmul_convolutions", lambda net, device: None)

if not simulated.SUPPORTED:
    pytest.skip("needs a machine without an accelerator", allow_module_level=True)

SIZES = "--imageSize 16 --nz 4 --ngf 4 --ndf 4"
RUN = f"--dataset fake {SIZES} --batchSize 400 --workers 0 --manualSeed 3".split()  # 1,000 images: 3 steps an epoch
ROOM = 10**9  # bytes
EXACT = ("netG", "netD", "netG_ema", "optimizerG", "optimizerD", "noise", "steps", "epoch", "step")


def train_on_cpu(folder, *arguments):
    """Run dcgan.py; return its exit code."""
    return dcgan.main([str(a) for a in ("--cache", folder.parent / "cache", "--outf", folder, *arguments)])


def train(folder, *arguments, free=ROOM):
    """Run dcgan.py on the simulated device; return its exit code."""
    with simulated.accelerator(free):
        return train_on_cpu(folder, *arguments, "--accel")


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoint(folder):
    return load(folder / "checkpoint.pth")


def leaves_of(tree, name=""):
    """Return {path: value} for every value of a nested state."""
    if not isinstance(tree, dict | list | tuple):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, value in items for path, leaf in leaves_of(value, f"{name}/{key}").items()}


def differences(folder, other):
    """Return the names of the values that differ, in any bit, between the checkpoints of two runs."""
    ours, theirs = (leaves_of({part: checkpoint(f)[part] for part in EXACT}) for f in (folder, other))
    assert ours.keys() == theirs.keys()
    return [name for name, x in ours.items() if not equal(x, theirs[name])]


def equal(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def watch(monkeypatch):
    """Return a list to which every step adds (device of the batch, device of the result, size of the batch)."""
    seen, step = [], TRAINER.step

    def watched(trainer, batch, *others):
        measures = step(trainer, batch, *others)
        seen.append((batch.device.type, measures.device.type, len(batch)))
        return measures

    monkeypatch.setattr(TRAINER, "step", watched)
    return seen


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def unbroken(base):
    """The folder of a run of two epochs. Tests must not change it."""
    assert train(base / "unbroken", *RUN, "--niter", 2) == 0
    return base / "unbroken"


@pytest.fixture
def device():
    with simulated.accelerator(ROOM) as device:
        yield device


# The device itself


def test_pytorch_finds_the_device():
    for free in (None, 5):
        with simulated.accelerator(free) as device:
            assert torch.accelerator.current_accelerator(check_available=True).type == device.type == "sim"
            assert torch.accelerator.is_available()
            if free:
                assert torch.accelerator.get_memory_info(device)[0] == free
            else:
                with pytest.raises(RuntimeError, match="cannot report"):
                    torch.accelerator.get_memory_info(device)
    with simulated.accelerator(float64=True) as device:
        assert torch.ones(2, device=device).double().device == device
    assert torch.accelerator.current_accelerator(check_available=True) is None


@pytest.mark.parametrize(
    "mix",
    [
        lambda cpu, sim: cpu + sim,
        lambda cpu, sim: sim @ cpu,
        lambda cpu, sim: torch.cat([cpu, sim]),
        lambda cpu, sim: torch.stack([cpu.sum(), sim.sum()]),
        lambda cpu, sim: cpu.sum().add_(sim.sum()),
        lambda cpu, sim: cpu[sim.argmax(0)],
        lambda cpu, sim: nn.functional.linear(sim, cpu),
    ],
)
def test_operands_on_two_devices_are_refused(device, mix):
    cpu = torch.rand(3, 3)
    mix(cpu, cpu)
    mix(cpu.to(device), cpu.to(device))
    with pytest.raises(RuntimeError, match="same device"):
        mix(cpu, cpu.to(device))


def test_cpu_tensors_that_a_gpu_accepts(device):
    cpu = torch.arange(6.0).reshape(2, 3)
    sim = cpu.pin_memory().to(device, non_blocking=True)
    assert sim.device == device
    sim[0] = torch.tensor([3.0, 4.0, 5.0])
    assert torch.equal((sim[torch.tensor([0, 0])] * torch.tensor(2.0)).cpu(), 2 * cpu[[1, 1]])


def test_values_leave_the_device_only_by_a_copy(device):
    sim = torch.tensor([1.0, 2.0], device=device)
    assert sim.tolist() == sim.cpu().tolist() == sim.cpu().numpy().tolist() == [1, 2]
    assert sim.sum().item() == float(sim.sum()) == 3
    assert f"{sim.sum():.1f}" == "3.0"
    for read in (sim.numpy, sim.__array__):
        with pytest.raises(TypeError, match=r"can't convert sim:0 .* to numpy"):
            read()
    with pytest.raises(TypeError, match="no float64"):
        sim.double()


def test_generators_draw_on_their_own_device(device):
    cpu, sim = torch.Generator().manual_seed(5), torch.Generator(device).manual_seed(5)
    state = sim.get_state()
    first = torch.rand(2, 3, device=device, generator=sim)
    assert torch.equal(first.cpu(), torch.rand(2, 3, generator=cpu))
    sim.set_state(state)
    assert torch.equal(first.cpu(), torch.empty(2, 3, device=device).uniform_(generator=sim).cpu())
    for where, generator in ((device, cpu), ("cpu", sim)):
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=where, generator=generator)
    with pytest.raises(RuntimeError, match="another device"):
        sim.set_state(cpu.get_state())


def test_files_record_the_device_of_a_tensor():
    with simulated.accelerator() as device:
        x = torch.ones(2, device=device)
        torch.save({"a": x.cpu()}, good := io.BytesIO())
        torch.save({"a": [x.cpu(), x]}, bad := io.BytesIO())
    for file in (good, bad):
        file.seek(0)
    assert torch.load(good)["a"].tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="SIM device"):
        torch.load(bad)
    bad.seek(0)
    assert load(bad)["a"][1].tolist() == [1, 1]


# Training


@pytest.mark.parametrize(("free", "where"), [(ROOM, "sim"), (2**20, "cpu"), (None, "sim")])
def test_prepared_images_are_on_the_device_if_there_is_room(base, monkeypatch, unbroken, free, where):
    seen = watch(monkeypatch)
    folder = base / f"room-{free}"
    assert train(folder, *RUN, "--niter", 2, free=free) == 0
    assert seen == [(where, "sim", 400), (where, "sim", 400), (where, "sim", 200)] * 2
    assert differences(folder, unbroken) == []


def test_resumed_run_equals_an_unbroken_one(base, unbroken):
    folder = base / "resumed"
    assert train(folder, *RUN, "--niter", 1) == 0
    assert "noise" in {name.split("/")[1] for name in differences(folder, unbroken)}
    assert train(folder, "--resume", "--niter", 2) == 0
    assert differences(folder, unbroken) == []


def test_stopped_run_resumes_exactly(base, unbroken, monkeypatch):
    folder, step = base / "stopped", TRAINER.step

    def step_and_signal(trainer, *batch):
        if trainer.steps_taken == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TRAINER, "step", step_and_signal)
        assert train(folder, *RUN, "--niter", 2) == 143
    assert [checkpoint(folder)[name] for name in ("epoch", "step", "steps")] == [0, 2, 2]
    assert train(folder, "--resume") == 0
    assert differences(folder, unbroken) == []


def test_a_run_can_change_devices(base, unbroken):
    folder = shutil.copytree(unbroken, base / "changed")
    assert train_on_cpu(folder, "--resume", "--niter", 3) == 0
    assert train(folder, "--resume", "--niter", 4) == 0
    assert checkpoint(folder)["steps"] == 12


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", ""),
        ("flip", "--flip"),
        ("augment", "--augment color,translation,cutout"),
        ("no-average", "--ema 0"),
        ("uncached", "--cache none"),
        ("one-image", "--dataset folder --dataroot {base}/one --niter 3"),
    ],
)
def test_three_steps_equal_those_on_the_cpu(base, monkeypatch, name, options):
    """Given the same noise and the same convolutions."""
    write_images(base / "one", "image.png")
    options = [*RUN, *f"--niter 1 --precision fp32 {options}".format(base=base).split()]
    seen = watch(monkeypatch)
    assert train(base / name, *options) == 0
    monkeypatch.setattr(*PLAIN_CONVOLUTIONS)
    assert train_on_cpu(base / f"{name}-cpu", *options) == 0
    assert [where for _, where, _ in seen] == ["sim"] * 3 + ["cpu"] * 3
    assert [size for *_, size in seen] == ([1, 1, 1] if name == "one-image" else [400, 400, 200]) * 2
    ours, theirs = (checkpoint(base / folder) for folder in (name, f"{name}-cpu"))
    nets = ["netG", "netD"] + ["netG_ema"] * (name != "no-average")
    assert [key for key in ours if key.startswith("net")] == nets
    for net in nets:
        torch.testing.assert_close(ours[net], theirs[net], rtol=0, atol=1e-6)


def test_bfloat16_is_near_float32(base):
    for precision in ("bf16", "fp32"):
        assert train(base / precision, *RUN, "--niter", 1, "--precision", precision) == 0
    rough, exact = (load(base / precision / "netD_epoch_0.pth")["main.0.weight"] for precision in ("bf16", "fp32"))
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=1e-3)


def test_training_starts_from_given_weights(base, unbroken):
    given = {name: unbroken / f"{name}_epoch_1.pth" for name in ("netG", "netD")}
    options = [text for name, path in given.items() for text in (f"--{name}", path)]
    assert train(base / "given", *RUN, *options, "--lr", 0, "--dry-run") == 0
    for name, path in given.items():
        saved, expected = load(base / "given" / f"{name}_epoch_0.pth"), load(path)
        assert all(torch.equal(saved[part], t) for part, t in expected.items() if part.endswith(("weight", "bias")))


class Corners(nn.Module):
    """A feature network: the red of an image's first pixel and the green of its last, in [0, 1]."""

    num_features = 2

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 1, -1, -1]], 1).float() / 255


def test_fid_equals_that_on_the_cpu(base, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr("support.options.check_installed", lambda: None)
    monkeypatch.setattr(dcgan, "FidMeter", functools.partial(FidMeter, feature=Corners()))
    monkeypatch.setattr(*PLAIN_CONVOLUTIONS)
    options = [*RUN, "--niter", 1, "--precision", "fp32", "--fid", 40]
    assert train(base / "fid", *options) == 0
    assert train_on_cpu(base / "fid-cpu", *options, "--cache", base / "other-cache") == 0
    logs = [(base / name / "log.csv").read_text().splitlines() for name in ("fid", "fid-cpu")]
    ours, theirs = ([float(row["fid"]) for row in csv.DictReader(log)][-1] for log in logs)
    assert 0 < ours == pytest.approx(theirs, rel=1e-4)
    best = load(base / "fid" / "netG_best.pth")
    torch.testing.assert_close(best, load(base / "fid-cpu" / "netG_best.pth"), rtol=0, atol=1e-6)


# Sampling


@pytest.mark.parametrize("mode", ["--num_output 3", "--interpolate 2", "--arithmetic 1,2-3+4", "--explore"])
def test_generated_files_equal_those_of_the_cpu(unbroken, tmp_path, monkeypatch, mode):
    seen, forward = [], models.Generator.forward

    def watched(netG, z):
        seen.append(z.device.type)
        return forward(netG, z)

    monkeypatch.setattr(models.Generator, "forward", watched)
    options = ["--load_path", str(unbroken), *mode.split(), "--outf"]
    with simulated.accelerator():
        generate.main([*options, str(tmp_path / "sim"), "--accel"])
    assert set(seen) == {"sim"}
    generate.main([*options, str(tmp_path / "cpu")])
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("sim", "cpu"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


# This one comes last: it reads the files of all runs above.


def test_saved_files_hold_cpu_tensors_only(base, unbroken):
    """Without map_location, as on a machine without the device: there, loading a device tensor fails."""
    names = {"checkpoint.pth", "checkpoint.prev.pth", "netG_epoch_1.pth", "netD_epoch_1.pth", "netG_ema_epoch_1.pth"}
    assert names <= {path.name for path in unbroken.iterdir()}
    wrong = {}
    for path in base.rglob("*.pth"):
        try:
            leaves = leaves_of(torch.load(path, weights_only=True))
            elsewhere = [name for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and not leaf.is_cpu]
        except RuntimeError as error:
            elsewhere = str(error)
        if elsewhere:
            wrong[str(path.relative_to(base))] = elsewhere
    assert wrong == {}
