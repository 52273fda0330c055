"""One training step of a DCGAN as the paper has it, and what makes it fast: precision, compilation, the captured graph.

`train_step` is the step, `runner` decides about precision and compilation, `CapturedStep` about the graph; `Training`
holds all that a step changes.
"""

import copy
import functools
import math
import sys

import torch
import torch.nn.functional as F

from models import fastest_layout, set_batch_norm_statistics, weights_of

WARM_UP = 3  # whole steps taken before one is captured, in which the libraries choose their kernels


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


def train_step(netG, netD, optimizerG, optimizerD, real, z, run):
    """Take one step of both networks, as in the paper (section 4) and in Goodfellow et al. 2014 (algorithm 1, k = 1).

    real: (N, nc, s, s) in [-1, 1]; z: (N, nz). run(f, *args) calls f(*args) its own way, as in another precision.
    Returns a tensor of MEASURES: the losses before their updates, the means of D(x), and of D(G(z)) before and after
    D's update.
    """
    # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
    netD.requires_grad_(True)
    optimizerD.zero_grad()
    fake = run(draw, netG, z)
    loss_D, D_x, D_G_z1 = run(objective_D, netD, real, fake.detach())
    loss_D.backward()
    optimizerD.step()

    # (2) Update G through the updated D: maximise log D(G(z))
    netD.requires_grad_(False)  # its own gradients are of no use here
    optimizerG.zero_grad()
    loss_G, D_G_z2 = run(objective_G, netD, fake)
    loss_G.backward()
    optimizerG.step()
    return torch.stack([loss_D.detach(), loss_G.detach(), D_x, D_G_z1, D_G_z2])


def default_precision(device):
    """Return "bf16" where a GPU computes in bfloat16, else "fp32"."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def emulates_bfloat16(device):
    """Return whether `device` is a CPU known to have no bfloat16 arithmetic, which PyTorch then emulates, slowly."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.12 does not tell
    return device.type == "cpu" and capabilities.get("avx512_bf16") is False


def why_not_compile(device):
    """Return in one line why torch.compile does not work here, as for want of a C++ compiler; None if it does."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(4, device=device))
    except Exception as error:  # the compilers behind it raise what they like
        return " ".join(str(error).split("\n\n")[0].split())[:200] or type(error).__name__


def runner(device, precision, compiled=False):
    """Return run(f, *args): f(*args) in `precision` ("fp32" or "bf16"), compiled or not.

    Compiled are the functions given to it, each by itself: objective_D always sees a D that learns, objective_G one
    that does not. A compiled network whose requires_grad changes could get the graph of the other case.
    """
    prepared = functools.cache(functools.partial(torch.compile, dynamic=False)) if compiled else lambda f: f

    def run(f, *args):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return prepared(f)(*args)

    return run


class CapturedStep:
    """step(batch) for batches of one shape on a CUDA device, as one CUDA graph: one launch instead of hundreds.

    The first WARM_UP calls run `step` as it is: they are steps like all others, and let the libraries choose kernels
    and the optimizers make their state. Then one is captured, which executes nothing, and replayed from there on.
    noise: the torch.Generator that `step` draws from. Where it cannot be captured, `step` goes on being run as it is.
    """

    def __init__(self, step, noise):
        self.step, self.noise, self.stream = step, noise, torch.cuda.Stream(noise.device)
        self.calls, self.graph = 0, None

    def __call__(self, batch):
        self.calls += 1
        if self.calls > WARM_UP and self.graph is None:
            self._capture(batch)
        if self.graph:
            self.batch.copy_(batch, non_blocking=True)
            self.graph.replay()
            return self.measures.clone()  # the next replay overwrites it
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            measures = self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return measures

    def _capture(self, batch):
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.noise)
        self.batch = torch.empty_like(batch, device=self.noise.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.measures = self.step(self.batch)
            self.graph = graph
        except RuntimeError as error:
            self.calls = -math.inf  # do not try again
            reason = " ".join(str(error).split())[:200]
            print(f"warning: the step runs uncaptured, which is slower ({reason})", file=sys.stderr)


class Training:
    """Both networks, the averaged generator, both optimizers and the noise, on one device: all that a step changes.

    lr, beta1: Adam's. ema: the average's decay, in [0, 1), 0 for none. precision: "fp32" or "bf16". seed: the noise's.
    Steps of `batch_size` pictures are compiled, if `compiled`, and captured as one graph on CUDA; others are not.
    """

    def __init__(self, netG, netD, device, *, lr, beta1, ema, precision, seed, batch_size=None, compiled=False):
        self.layout = fastest_layout(device)
        self.netG, self.netD = (net.to(device, memory_format=self.layout).train() for net in (netG, netD))
        self.netG_ema = copy.deepcopy(self.netG).requires_grad_(False) if ema else None
        self.device, self.ema, self.steps, self.batch_size = device, ema, 0, batch_size
        self.capturable = device.type == "cuda"
        settings = {"lr": lr, "betas": (beta1, 0.999), "fused": True, "capturable": self.capturable}
        self.optimizerG = torch.optim.Adam(self.netG.parameters(), **settings)
        self.optimizerD = torch.optim.Adam(self.netD.parameters(), **settings)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.blend = torch.zeros((), device=device)  # of the average; on the device, where a captured step reads it
        self.plain_step = functools.partial(self._step, runner(device, precision))
        self.fast_step = functools.partial(self._step, runner(device, precision, compiled))
        self.whole_step = self._captured()

    def _captured(self):
        return CapturedStep(self.fast_step, self.noise) if self.capturable else self.fast_step

    def step(self, batch):
        """Take one step with a batch of uint8 pictures (N, nc, s, s); return its MEASURES, a tensor on the device."""
        self.blend.fill_(1 - min(self.ema, (1 + self.steps) / (10 + self.steps)))
        if self.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory().to(self.device, non_blocking=True)  # does not wait for the step before
        measures = (self.whole_step if len(batch) == self.batch_size else self.plain_step)(batch)
        self.steps += 1
        return measures

    def _step(self, run, batch):
        real = batch.to(self.device).contiguous(memory_format=self.layout).float().div_(127.5).sub_(1)  # [-1, 1]
        z = torch.randn(len(batch), self.netG.nz, device=self.device, generator=self.noise)
        measures = train_step(self.netG, self.netD, self.optimizerG, self.optimizerD, real, z, run)
        if self.netG_ema is not None:
            update_average(self.netG_ema, self.netG, self.blend)
        return measures

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
        """Return all that an exact continuation needs; `load_state_dict` takes it, on any kind of device."""
        state = {name: weights_of(getattr(self, name)) for name in self._networks()}
        state |= {name: getattr(self, name).state_dict() for name in ("optimizerG", "optimizerD")}
        return state | {"noise": self.noise.get_state(), "steps": self.steps}

    def load_state_dict(self, state):
        for name in (*self._networks(), "optimizerG", "optimizerD"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizerG, self.optimizerD):
            for weight, moments in optimizer.state.items():
                if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == weight.shape:
                    raise ValueError("an optimizer's moments are not of its weights' shape")
        for group in self.optimizerG.param_groups + self.optimizerD.param_groups:
            group["capturable"] = self.capturable  # that of another kind of device came with the state
        self.whole_step = self._captured()  # what was captured holds the optimizers' old tensors
        self.steps = state["steps"]
        if self.noise.get_state().shape == state["noise"].shape:
            self.noise.set_state(state["noise"])
        else:  # it was saved on another kind of device
            self.noise.manual_seed(self.noise.initial_seed() + self.steps)


@torch.no_grad()
def update_average(netG_ema, netG, blend):
    """Move the averaged weights towards G's: average = (1 - blend) * average + blend * weight; blend: a tensor ()."""
    for average, weight in zip(netG_ema.parameters(), netG.parameters(), strict=True):
        average.lerp_(weight, blend)
