"""One training step of a DCGAN as the paper has it, and what makes it fast: precision, compilation, the captured graph.

`train_step` is the step, `runner` decides about precision, compilation and the averaging of gradients over processes,
`CapturedStep` about the graph, `multiply_innermost` about convolutions on a CPU; `Training` holds what a step changes.
"""

import copy
import functools
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import set_batch_norm_statistics
from support.accelerator import CapturedStep, fastest_layout
from support.cpu_convolutions import multiply_innermost
from support.distributed import everyones, part_of, place
from support.sync_batch_norm import synchronize_batch_norm
from support.weights import weights_of


def bce(logits, *, real):
    """Binary cross-entropy of D's logits (N,) against the label real or fake: -log D or -log(1 - D), the mean, in nats.

    -log sigmoid(x) = softplus(-x): exact where a sigmoid, all the more one in bfloat16, would round to 0 or 1.
    """
    return F.softplus(-logits.float() if real else logits.float()).mean()


def mean_probability(logits):
    return torch.sigmoid(logits.detach().float()).mean()


def draw(netG, z):
    return netG(z)


def objective_D(netD, real, fake):
    """Return what D minimises, -log D(x) - log(1 - D(G(z))), and the means of D(x) and D(G(z)).

    Two passes: batch norm must not mix real and fake.
    """
    logits_real, logits_fake = netD.logits(real), netD.logits(fake)
    loss = bce(logits_real, real=True) + bce(logits_fake, real=False)
    return loss, mean_probability(logits_real), mean_probability(logits_fake)


def objective_G(netD, fake):
    """Return what G minimises, -log D(G(z)), which does not saturate where D wins, and the mean of D(G(z))."""
    logits = netD.logits(fake)
    return bce(logits, real=True), mean_probability(logits)


def train_step(netG, netD, optimizerG, optimizerD, real, z, run, weight=1.0):
    """Take one step of both networks, as in the paper (section 4) and in Goodfellow et al. 2014 (algorithm 1, k = 1).

    real: (N, nc, s, s) in [-1, 1]; z: (N, nz). run(f, net, *args) calls f(net, *args) its own way, as in another
    precision. weight: what this batch's mean counts among those of other processes. Returns a tensor of MEASURES: the
    losses before their updates, the means of D(x), and of D(G(z)) before and after D's update.
    """
    # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
    netD.requires_grad_(True)
    optimizerD.zero_grad()
    fake = run(draw, netG, z)
    loss_D, D_x, D_G_z1 = run(objective_D, netD, real, fake.detach())
    (weight * loss_D).backward()
    optimizerD.step()

    # (2) Update G through the updated D: maximise log D(G(z))
    netD.requires_grad_(False)  # its own gradients are of no use here
    optimizerG.zero_grad()
    loss_G, D_G_z2 = run(objective_G, netD, fake)
    (weight * loss_G).backward()
    optimizerG.step()
    return torch.stack([loss_D.detach(), loss_G.detach(), D_x, D_G_z1, D_G_z2])


def runner(device, precision, compiled=False, spread=()):
    """Return run(f, net, *args): f(net, *args) in `precision` ("fp32" or "bf16"), compiled or not.

    Compiled are the functions given to it, each by itself: objective_D always sees a D that learns, objective_G one
    that does not. A compiled network whose requires_grad changes could get the graph of the other case.
    spread: pairs of f and net whose gradients are averaged over all processes, once per backward pass.
    """
    prepared = functools.cache(functools.partial(torch.compile, dynamic=False)) if compiled else lambda f: f
    # The networks begin equal, and batch norm's buffers are each process's own.
    settings = {"init_sync": False, "broadcast_buffers": False, "gradient_as_bucket_view": True}
    with warnings.catch_warnings():  # of a new name for broadcast_buffers, which PyTorch before 2.13 does not know
        warnings.simplefilter("ignore", FutureWarning)
        spread = {f: DistributedDataParallel(Part(prepared(f), net), **settings) for f, net in spread}
    if device.type == "cpu":
        for parallel in spread.values():
            parallel.register_comm_hook(None, average_in_order)

    def run(f, net, *args):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return spread[f](*args) if f in spread else prepared(f)(net, *args)

    return run


def average_in_order(_, bucket):
    """Average a bucket of gradients over all processes, adding always in the same order, for exact continuation.

    A ring of three or more adds a number in an order that follows from its place in the tensor, and its place in the
    bucket changes after a first step: there each weight's gradient goes by itself.
    """
    processes, gradients = place()[1], bucket.buffer()
    tensors = [gradients] if processes == 2 else bucket.gradients()
    sums = torch.futures.collect_all([dist.all_reduce(tensor, async_op=True).get_future() for tensor in tensors])
    return sums.then(lambda _: gradients.div_(processes))


class Part(nn.Module):
    """f(net, *args) as a module, which is what DistributedDataParallel takes."""

    def __init__(self, f, net):
        super().__init__()
        self.f, self.net = f, net

    def forward(self, *args):
        return self.f(self.net, *args)


class Training:
    """Both networks, the averaged generator, both optimizers and the noise, on one device: all that a step changes.

    lr, beta1: Adam's. ema: the average's decay, in [0, 1), 0 for none. precision: "fp32" or "bf16". seed: the noise's.
    flip: mirror each picture with a probability of one half. Steps of `batch_size` pictures are compiled, if
    `compiled`, and captured as one graph on CUDA; others are not.

    Where several processes have joined, each has a Training, takes its part of every batch, and ends up with the same
    weights; with `compiled`, parts of every size are compiled. sync_bn: batch norm over the parts of all of them.
    """

    def __init__(
        self,
        netG,
        netD,
        device,
        *,
        lr,
        beta1,
        ema,
        precision,
        seed,
        batch_size=None,
        compiled=False,
        sync_bn=False,
        flip=False,
    ):
        self.rank, self.processes = place()
        if sync_bn:
            synchronize_batch_norm(netG), synchronize_batch_norm(netD)
        self.layout = fastest_layout(device)
        self.netG, self.netD = (net.to(device, memory_format=self.layout).train() for net in (netG, netD))
        self.netG_ema = copy.deepcopy(self.netG).requires_grad_(False) if ema else None
        if device.type == "cpu" and precision == "fp32" and not compiled:
            multiply_innermost(self.netG), multiply_innermost(self.netD)
        self.device, self.ema, self.flip, self.steps, self.batch_size = device, ema, flip, 0, batch_size
        self.capturable = device.type == "cuda" and self.processes == 1
        settings = {"lr": lr, "betas": (beta1, 0.999), "fused": True, "capturable": device.type == "cuda"}
        self.optimizerG = torch.optim.Adam(self.netG.parameters(), **settings)
        self.optimizerD = torch.optim.Adam(self.netD.parameters(), **settings)
        self.noise = torch.Generator(device).manual_seed(seed + self.rank)
        self.blend = torch.zeros((), device=device)  # of the average; on the device, where a captured step reads it
        spread = ((draw, self.netG), (objective_D, self.netD)) if self.processes > 1 else ()
        self.fast_step = functools.partial(self._step, runner(device, precision, compiled, spread))
        # Two of DistributedDataParallel on the same weights would both average their gradients.
        self.plain_step = self.fast_step if spread else functools.partial(self._step, runner(device, precision))
        self.whole_step = self._captured()

    def _captured(self):
        return CapturedStep(self.fast_step, self.noise) if self.capturable else self.fast_step

    def step(self, batch, of=None):
        """Take one step with a batch of uint8 pictures (N, nc, s, s); return its MEASURES, a tensor on the device.

        of: how many pictures all processes have in this step, of which this one has its part, or fewer if some cannot
        be read; the mean over the processes of what they return is then that over all pictures.
        """
        weight = 1.0
        if self.processes > 1:
            weight = len(part_of(range(of), self.rank, self.processes)) * self.processes / of if len(batch) else 0.0
            for layer in (*self.netG.main, *self.netD.main):
                layer.counted = float(len(batch) > 0)  # SyncBatchNorm's
            if not len(batch):  # the others wait for gradients
                batch = torch.zeros(1, *batch.shape[1:], dtype=torch.uint8)
        self.blend.fill_(1 - min(self.ema, (1 + self.steps) / (10 + self.steps)))
        if self.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory().to(self.device, non_blocking=True)  # does not wait for the step before
        whole = len(batch) == self.batch_size and weight == 1
        measures = (self.whole_step if whole else functools.partial(self.plain_step, weight=weight))(batch)
        self.steps += 1
        return measures

    def _step(self, run, batch, weight=1.0):
        real = batch.to(self.device).contiguous(memory_format=self.layout).float().div_(127.5).sub_(1)  # [-1, 1]
        if self.flip:
            mirrored = torch.rand(len(batch), 1, 1, 1, device=self.device, generator=self.noise) < 0.5
            real = torch.where(mirrored, real.flip(3), real)
        z = torch.randn(len(batch), self.netG.nz, device=self.device, generator=self.noise)
        measures = train_step(self.netG, self.netD, self.optimizerG, self.optimizerD, real, z, run, weight)
        if self.netG_ema is not None:
            update_average(self.netG_ema, self.netG, self.blend)
        return weight * measures

    @property
    def shown_generator(self):
        return self.netG if self.netG_ema is None else self.netG_ema

    def refresh_statistics(self, batch_size):
        """Give the generators true batch-norm statistics: over about 1,024 fresh latents, in batches as in training."""
        noise = torch.Generator().manual_seed(self.steps)  # not the noise of training, which must not notice
        z = torch.randn(math.ceil(1024 / batch_size), batch_size, self.netG.nz, generator=noise).to(self.device)
        for name in self._networks():
            if name != "netD":
                set_batch_norm_statistics(getattr(self, name), z)

    def _networks(self):
        return ("netG", "netD") if self.netG_ema is None else ("netG", "netD", "netG_ema")

    def state_dict(self):
        """Return all that an exact continuation needs; `load_state_dict` takes it, on any kind of device.

        Where several processes have joined, all must call it.
        """
        state = {name: weights_of(getattr(self, name)) for name in self._networks()}
        state |= {name: getattr(self, name).state_dict() for name in ("optimizerG", "optimizerD")}
        return state | {"noise": everyones(self.noise.get_state()), "steps": self.steps}

    def load_state_dict(self, state):
        for name in (*self._networks(), "optimizerG", "optimizerD"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizerG, self.optimizerD):
            for weight, moments in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if moments[name].shape != weight.shape:
                        raise ValueError("an optimizer's moments are not of its weights' shape")
                    # In the layout of this device: the fused Adam pairs numbers by their place in memory.
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
        for group in self.optimizerG.param_groups + self.optimizerD.param_groups:
            group["capturable"] = self.device.type == "cuda"  # that of another kind of device came with the state
        self.whole_step = self._captured()  # what was captured holds the optimizers' old tensors
        self.steps = state["steps"]
        noise = state["noise"]
        if len(noise) == self.processes and noise[self.rank].shape == self.noise.get_state().shape:
            self.noise.set_state(noise[self.rank])
        else:  # it was saved on another kind of device, or by another number of processes
            self.noise.manual_seed(self.noise.initial_seed() + self.steps)


@torch.no_grad()
def update_average(netG_ema, netG, blend):
    """Move the averaged weights towards G's: average = (1 - blend) * average + blend * weight; blend: a tensor ()."""
    for average, weight in zip(netG_ema.parameters(), netG.parameters(), strict=True):
        average.lerp_(weight, blend)


# The innermost layers on a CPU, as matrix products


# Several processes, of which torch's launcher started each; without it, all of this is about one alone.
