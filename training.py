"""One training step of a DCGAN as the paper has it, and what makes it fast: precision, compilation, the captured graph.

`train_step` is the step, `runner` decides about precision, compilation and the averaging of gradients over processes,
`CapturedStep` about the graph, `multiply_innermost` about convolutions on a CPU; `Training` holds what a step changes.
"""

import copy
import datetime
import functools
import itertools
import logging
import math
import os
import signal
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


def multiply_innermost(net):
    """Let the innermost convolutions of a Generator or Discriminator be matrix products while it trains in float32.

    What is computed stays the same but for rounding. oneDNN's convolutions are slow where a map is a single point (the
    paper's 100 x 512 and 512 x 1 take eight times as long), and where weights far outnumber the points of a map (the
    512 x 256 on 4 x 4, 1.27 times; two AVX-512 cores, batches of 128). Four times the input is kept for the gradients.
    """
    layers = [layer for layer in net.main if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    dense, strided = layers[:2] if layers[0].transposed else layers[:-3:-1]
    points, weights = dense.weight[0, 0].numel(), strided.weight[..., 0, 0].numel()
    chosen = [dense, strided] if weights > 5_000 * points else [dense]  # 512 x 256 on 5 x 5; on 6 x 6 nothing is gained
    for layer in chosen:
        layer.__class__ = MultipliedTransposed if layer.transposed else Multiplied


class Multiplied(nn.Conv2d):
    """A convolution of a Discriminator: (N, C, s, s) to (N, C', s / 2, s / 2), or by a kernel of s to (N, C', 1, 1)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k k C)
        dense = self.stride == (1, 1)
        rows, side = (x.flatten(1), 1) if dense else (Windows.apply(x), x.shape[1] // 2)
        return (rows @ weight.T).view(len(x), side, side, -1).permute(0, 3, 1, 2)


class MultipliedTransposed(nn.ConvTranspose2d):
    """A transposed one of a Generator: (N, C, s, s) to (N, C', 2 s, 2 s), or (N, C, 1, 1) to (N, C', k, k)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C, k k C')
        rows, dense = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight, self.stride == (1, 1)
        y = rows.view(len(x), *self.kernel_size, -1) if dense else Overlap.apply(rows, x.shape[2])
        return y.permute(0, 3, 1, 2)


class Windows(torch.autograd.Function):
    """The windows of 4 x 4, two apart, of (N, 2b, 2b, C) in a border of zeros, as the rows of (N b b, 16 C)."""

    @staticmethod
    def forward(context, x):
        context.side = x.shape[1] // 2
        x = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
        (n, _, _, channels), (picture, line, point, _) = x.shape, x.stride()
        shape = (n, context.side, context.side, 4, 4 * channels)
        return x.as_strided(shape, (picture, 2 * line, 2 * point, line, 1)).reshape(-1, 16 * channels)

    @staticmethod
    def backward(context, gradient):
        return Overlap.apply(gradient, context.side)


class Overlap(torch.autograd.Function):
    """The transpose of Windows: lay the rows out as windows of (N, 2b, 2b, C), and add what lies on one point."""

    @staticmethod
    def forward(context, rows, side):
        rows = rows.reshape(-1, side, side, 2, 2, 2, 2, rows.shape[1] // 16)  # a window as 2 x 2 tiles of 2 x 2 points
        tiles = rows.new_zeros(len(rows), side + 1, 2, side + 1, 2, rows.shape[-1])
        for down, right in itertools.product((0, 1), (0, 1)):
            tiles[:, down : down + side, :, right : right + side] += rows[:, :, :, down, :, right].transpose(2, 3)
        return tiles.flatten(3, 4).flatten(1, 2)[:, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(context, gradient):
        return Windows.apply(gradient), None


# Several processes, of which torch's launcher started each; without it, all of this is about one alone.


def join(hours=6):
    """Join the other processes of a job; return (this one's number, how many there are)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        timeout = datetime.timedelta(hours=hours)  # one may prepare pictures for long
        store, rank, processes = next(dist.rendezvous("env://", timeout=timeout))
        # A restarted job may find the addresses of the one before in the store.
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}-{processes}", store)
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)
    return place()


def is_lost_process(error):
    """Return whether another process of the job has ended, which is what `error` comes from."""
    ends = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
    return place()[1] > 1 and any(end in str(error) for end in ends)


def place():
    """Return (this process's number, how many there are)."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def part_of(items, rank, processes):
    """Return what process `rank` has of `items`: parts as equal as can be, in order."""
    start, longer = divmod(len(items), processes)
    begin = rank * start + min(rank, longer)
    return items[begin : begin + start + (rank < longer)]


def everyones(value):
    """Return the list of every process's `value`."""
    values = [value] * place()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def firsts(value):
    """Return the first process's `value`."""
    values = [value]
    if place()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def largest(number):
    """Return the largest of every process's whole numbers."""
    if place()[1] == 1:
        return number
    values = torch.tensor(number)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def mean_over_processes(values):
    """Return the mean of every process's tensor."""
    if place()[1] > 1:
        dist.all_reduce(values)
    return values / place()[1]


class AllSum(torch.autograd.Function):
    """The sum of every process's tensor, through which gradients flow back to all of them."""

    @staticmethod
    def forward(_, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes (torch's own of this name does not run on a CPU).

    counted: 0.0 where this process's batch is none of the pictures, only there to take part.
    """

    counted = 1.0

    def forward(self, x):
        if not self.training or place()[1] == 1:
            return super().forward(x)
        values = x.float()
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([x[:, 0].numel()])])
        sums = AllSum.apply(self.counted * sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        values = values - mean[:, None, None]
        var = AllSum.apply(self.counted * values.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norm(net):
    """Replace the batch norms of a Generator or Discriminator by such as see the batches of all processes."""
    for i, layer in enumerate(net.main):
        if isinstance(layer, nn.BatchNorm2d):
            net.main[i] = SyncBatchNorm(layer.num_features)
            net.main[i].load_state_dict(layer.state_dict())


def launch(processes, script, argv):
    """Run a script in so many processes on this machine, by torch's launcher; return its exit code."""
    logging.disable(logging.ERROR)  # in the launcher: the processes speak for themselves
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in; 30 in PyTorch before 2.13
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]  # those not ignored by nohup
    names = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    with tempfile.TemporaryDirectory() as logs:
        where |= {"logs_specs": DefaultLogsSpecs(log_dir=logs), "signals_to_handle": ",".join(names)}
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, **where)
        try:
            elastic_launch(config, sys.executable)(script, *argv)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
            return code if code > 0 else 128 - code  # that of a shell, where a signal killed it
    return 0
