"""The device: which one, what makes it fast, its precision, and the step captured as a CUDA graph."""

import ctypes
import math
import platform
import sys

import torch

from support.errors import RunError

M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2  # malloc.h
WARM_UP = 3  # whole steps taken before one is captured, in which the libraries choose their kernels


def pick_device(cuda, accel, number=0):
    """Return the torch.device that --cuda and --accel ask for: without them, or where --accel finds none, the CPU.

    number: which of several GPUs.
    Raises RunError if CUDA is asked for and there is none.
    """
    if cuda and not torch.cuda.is_available():
        raise RunError("--cuda: torch finds no CUDA device here; leave --cuda out to run on the CPU")
    found = accel and torch.accelerator.current_accelerator(check_available=True)
    if cuda or (found and found.type == "cuda"):
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    return found or torch.device("cpu")


def tune(device):
    """Set what makes networks fast on `device`, for the whole process.

    On the CPU, glibc gives every large buffer back to the system as soon as it is free, and the next one is made anew,
    page by page, at each layer of each step; here it keeps them. On CUDA, cuDNN tries its kernels and takes the best.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(option, value)


def fastest_layout(device):
    """Return the memory format in which a network is fastest on `device`."""
    # On mps, the gradient of batch norm is wrong in channels-last (pytorch issue 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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
