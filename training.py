"""One training step of a DCGAN as in the paper, and the Trainer, which holds all that a step changes.

>>> trainer = Trainer(Generator(), Discriminator(), torch.device("cpu"), TrainerSettings())
>>> result = StepResult(*trainer.step(batch).tolist())  # batch: uint8 (N, 3, 64, 64)
"""

import contextlib
import copy
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import set_batch_norm_statistics
from support.accelerator import copy_to_cpu, fastest_memory_format, to_device
from support.augmentation import Augmentation
from support.captured_step import CapturedStep, graph_branch
from support.contrast import find_contrast_factor, with_contrast_factor
from support.distributed import (
    all_gather_object,
    all_reduce_mean,
    all_reduces_with_nccl,
    average_gradients,
    rank_and_world_size,
)
from support.errors import UserError
from support.matmul_convolutions import use_matmul_convolutions
from support.sync_batch_norm import use_sync_batch_norm

DIVERGED = (
    "is not finite: the run has diverged; start a new one with a smaller --lr. Checkpoints saved before are intact"
)
NO_AUTOCAST, NO_AUGMENTATION = contextlib.nullcontext(), Augmentation()


class StepResult(NamedTuple):
    """What a step reports, each the mean over its batch: losses in nats, probabilities in [0, 1]."""

    loss_D: torch.Tensor  # loss_D_real + loss_D_fake, before D's update
    loss_D_real: torch.Tensor  # -log D(x)
    loss_D_fake: torch.Tensor  # -log(1 - D(G(z)))
    loss_G: torch.Tensor  # -log D(G(z)), after D's update, before G's
    D_x: torch.Tensor  # D(x)
    D_G_z1: torch.Tensor  # D(G(z)) before D's update
    D_G_z2: torch.Tensor  # D(G(z)) after D's update


def train_step(netG, netD, optimizerG, optimizerD, real, z, autocast=NO_AUTOCAST, augment=NO_AUGMENTATION):
    """Take one step of both networks (Radford et al. 2016, section 4; Goodfellow et al. 2014, algorithm 1, k = 1).

    real: (N, nc, s, s) in [-1, 1]; z: (N, nz) from N(0, 1); autocast: the context in which the networks compute;
    augment: an Augmentation of the images that D sees.
    Returns a StepResult of scalar tensors. With several processes, each takes its shard of the batch.
    """
    # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
    netD.requires_grad_(True)
    optimizerD.zero_grad()
    with autocast:
        with graph_branch(real.device) as join:  # in a CUDA graph, at the same time as G(z)
            real_logits = netD.logits(augment(real))
        fake = netG(z)
        join()
        fake_logits = netD.logits(augment(fake.detach()))  # a pass of its own: batch norm must not mix them
    loss_D_real, loss_D_fake = bce(real_logits, 1), bce(fake_logits, 0)
    loss_D = loss_D_real + loss_D_fake
    loss_D.backward()
    average_gradients(netD)
    optimizerD.step()

    # (2) Update G through the updated D: maximise log D(G(z))
    netD.requires_grad_(False)  # D's own gradients are not needed here
    optimizerG.zero_grad()
    with autocast:
        updated_logits = netD.logits(augment(fake))
    loss_G = bce(updated_logits, 1)
    loss_G.backward()
    average_gradients(netG)
    optimizerG.step()

    losses = [loss.detach() for loss in (loss_D, loss_D_real, loss_D_fake, loss_G)]
    return StepResult(*losses, *map(mean_probability, (real_logits, fake_logits, updated_logits)))


def bce(logits, label):
    """Return the binary cross-entropy in nats, the mean over D's logits (N,): -log D for label 1, -log(1 - D) for 0.

    It is computed from logits in float32: a sigmoid, above all in bfloat16, would round to 0 or 1.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, label, dtype=torch.float32))


def mean_probability(logits):
    return torch.sigmoid(logits.detach().float()).mean()


@torch.no_grad()
def update_ema(netG_ema, netG, one_minus_decay):
    """Move the moving average towards G: average = decay * average + (1 - decay) * parameter.

    one_minus_decay: a scalar tensor on the device.
    """
    for average, parameter in zip(netG_ema.parameters(), netG.parameters(), strict=True):
        average.lerp_(parameter, one_minus_decay)


@dataclass(frozen=True)
class TrainerSettings:
    """How a Trainer trains."""

    lr: float = 0.0002  # of both Adams
    beta1: float = 0.5  # of both Adams; their beta2 is 0.999
    ema: float = 0.99  # decay of the generator's moving average, in [0, 1); 0: off
    precision: str = "fp32"  # or "bf16": autocast to bfloat16
    seed: int = 0  # of the random number generator
    flip: bool = False  # mirror each image with a probability of one half
    augment: str = "none"  # or names of support.augmentation.CHANGES, separated by commas
    sync_bn: bool = False  # batch norm over the batches of all processes
    compile: bool = False  # compile the networks with torch.compile
    target_contrast: float = 0  # of samples: that of the training images; 0: samples stay as they are
    shard_size: int = 0  # images of this process in a full batch; only full batches are compiled and captured


class Trainer:
    """All that a step changes, on one device: the networks, the averaged generator, optimizers and random numbers.

    With several processes, each has a Trainer, takes its shard of every batch, and ends up with the same weights.
    """

    def __init__(self, netG, netD, device, settings):
        self.device, self.settings, self.steps_taken = device, settings, 0
        self.rank, self.world_size = rank_and_world_size()
        self.memory_format = fastest_memory_format(device)
        if settings.sync_bn:
            use_sync_batch_norm(netG), use_sync_batch_norm(netD)
        self.netG, self.netD = (net.to(device, memory_format=self.memory_format).train() for net in (netG, netD))
        self.netG_ema = copy.deepcopy(self.netG).requires_grad_(False) if settings.ema else None
        fp32_on_cpu = device.type == "cpu" and settings.precision == "fp32" and not settings.compile
        if fp32_on_cpu or device.type == "cuda":
            use_matmul_convolutions(self.netG, device), use_matmul_convolutions(self.netD, device)
        adam = {"lr": settings.lr, "betas": (settings.beta1, 0.999), "fused": True}
        self.optimizerG = torch.optim.Adam(self.netG.parameters(), **adam)
        self.optimizerD = torch.optim.Adam(self.netD.parameters(), **adam)
        self.rng = torch.Generator(device).manual_seed(settings.seed + self.rank)
        self.one_minus_decay = torch.zeros((), device=device)  # a tensor, for a CUDA graph to read
        self.contrast_factor = 1.0  # of the generator that is sampled from, found at the last save
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        self.compiled = compile_networks(self.netG, self.netD) if settings.compile else None
        self.captured_step = self.new_captured_step()

    def new_captured_step(self):
        """Return a CapturedStep, or None where there is no CUDA graph: it can hold no all-reduce but NCCL's."""
        can_capture = self.device.type == "cuda" and (self.world_size == 1 or all_reduces_with_nccl())
        return CapturedStep(self) if can_capture else None

    def close(self):
        """Free the CUDA graph after the last step. NCCL lets no process end while a graph holds an all-reduce."""
        if self.captured_step:
            self.captured_step.release()

    def step(self, batch):
        """Take one step with a batch, uint8 (N, nc, s, s); return its StepResult as a tensor (7,) on the device."""
        self.one_minus_decay.fill_(1 - min(self.settings.ema, (1 + self.steps_taken) / (10 + self.steps_taken)))
        batch = to_device(batch, self.device)
        full = len(batch) == self.settings.shard_size
        result = self.captured_step(batch) if full and self.captured_step else self.eager_step(batch)
        self.steps_taken += 1
        return result

    def eager_step(self, batch):
        """Take one step without a CUDA graph, with a batch on the device; return what `step` does."""
        real = batch.contiguous(memory_format=self.memory_format).float().div_(127.5).sub_(1)  # [0, 255] to [-1, 1]
        if self.settings.flip:
            mirrored = torch.rand(len(batch), 1, 1, 1, device=self.device, generator=self.rng) < 0.5
            real = torch.where(mirrored, real.flip(3), real)
        z = torch.randn(len(batch), self.netG.nz, device=self.device, generator=self.rng)
        full = len(batch) == self.settings.shard_size
        nets = self.compiled if self.compiled and full else (self.netG, self.netD)
        augment = Augmentation(self.settings.augment, self.rng)
        result = train_step(*nets, self.optimizerG, self.optimizerD, real, z, self.autocast, augment)
        if self.netG_ema is not None:
            update_ema(self.netG_ema, self.netG, self.one_minus_decay)
        return torch.stack(result)

    def prepare_sampling(self, batch_size):
        """Set the batch-norm statistics of the generators and the contrast factor, which only sampling needs.

        Both are computed from about 1,024 new latent vectors; the statistics are those of batches of `batch_size`.
        Returns the contrast of the generator to sample from, without the factor; None without a target_contrast.
        """
        rng = torch.Generator().manual_seed(self.steps_taken)  # not self.rng, which must not change
        z = torch.randn(math.ceil(1024 / batch_size), batch_size, self.netG.nz, generator=rng).to(self.device)
        for name, net in self.networks().items():
            if name != "netD":
                set_batch_norm_statistics(net, z)
        if not self.settings.target_contrast:
            return None
        sampled = self.networks()[self.sampled_name]
        self.contrast_factor, contrast = find_contrast_factor(sampled, z.flatten(0, 1), self.settings.target_contrast)
        return contrast

    @property
    def sampled_name(self):
        """The name of the generator to sample from: the averaged one, or the plain one where there is no average."""
        return "netG" if self.netG_ema is None else "netG_ema"

    def sampling_generator(self):
        """Return a copy of the generator to sample from, with the contrast factor."""
        return with_contrast_factor(self.networks()[self.sampled_name], self.contrast_factor)

    def networks(self):
        """Return the networks by name: netG, netD, and netG_ema if there is one."""
        named = {"netG": self.netG, "netD": self.netD, "netG_ema": self.netG_ema}
        return {name: net for name, net in named.items() if net is not None}

    def check_finite(self):
        """Raise UserError if a weight is not finite."""
        for name, net in self.networks().items():
            if not torch.stack([t.isfinite().all() for t in net.state_dict().values()]).all():
                raise UserError(f"a weight of {name} {DIVERGED}")

    def state_dict(self):
        """Return a copy of all that an exact resume needs, on the CPU. With several processes, all must call it."""
        parts = self.networks() | {"optimizerG": self.optimizerG, "optimizerD": self.optimizerD}
        state = {name: copy_to_cpu(dict(part.state_dict())) for name, part in parts.items()}
        state |= {"steps": self.steps_taken, "contrast_factor": self.contrast_factor}
        state |= {"target_contrast": self.settings.target_contrast}
        # "noise": the state of each process's random number generator, by rank
        return state | {"noise": all_gather_object(self.rng.get_state())}

    def load_state_dict(self, state):
        """Load what `state_dict` returned, on a device of any kind. Raises an exception if it does not fit."""
        for name, part in (self.networks() | {"optimizerG": self.optimizerG, "optimizerD": self.optimizerD}).items():
            part.load_state_dict(state[name])
        for optimizer in (self.optimizerG, self.optimizerD):
            for weight, moments in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if moments[name].shape != weight.shape:
                        raise ValueError("an optimizer's moments do not have the shape of its weights")
                    # In the memory format of the weights: the fused Adam pairs numbers by their position in memory.
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
            for group in optimizer.param_groups:
                group["capturable"] = False  # it is set in some old checkpoints
        self.captured_step = self.new_captured_step()  # what was captured holds the optimizers' old tensors
        self.steps_taken = state["steps"]
        self.contrast_factor = 1.0
        if self.settings.target_contrast:
            self.contrast_factor = state.get("contrast_factor", 1.0)  # old checkpoints have none
        states = state["noise"]
        if len(states) == self.world_size and states[self.rank].shape == self.rng.get_state().shape:
            self.rng.set_state(states[self.rank])
        else:  # saved on another kind of device, or by another number of processes
            self.rng.manual_seed(self.rng.initial_seed() + self.steps_taken)


def compile_networks(netG, netD):
    """Return shallow copies of both networks, which share their weights, with compiled computations."""
    netG, netD = copy.copy(netG), copy.copy(netD)
    netG.forward = torch.compile(netG.forward, dynamic=False)
    netD.logits = torch.compile(netD.logits, dynamic=False)
    return netG, netD


class StepAverages:
    """The mean StepResult of several steps, summed on the device and read once: each read waits for the device."""

    def __init__(self):
        self.sum, self.steps, self.images, self.start = 0, 0, 0, time.perf_counter()

    def add(self, result, images):
        self.sum, self.steps, self.images = self.sum + result, self.steps + 1, self.images + images

    def compute(self):
        """Return a dictionary of StepResult's fields and images_per_s, over all processes, which must all call it.

        Raises UserError if a value is not finite.
        """
        means = StepResult(*all_reduce_mean(self.sum / self.steps).tolist())._asdict()
        if not all(map(math.isfinite, means.values())):
            raise UserError(f"the loss {DIVERGED}")
        return means | {"images_per_s": self.images / (time.perf_counter() - self.start)}
