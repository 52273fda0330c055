"""The device of a run: which one, its memory, precision and kernels."""

import ctypes
import platform
import re

import torch

from support.errors import UserError, error_text

M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2  # malloc.h
ASSUMED_FREE = 3 << 30  # bytes of an accelerator that does not tell how much memory is free
OUT_OF_MEMORY = "out of memory|can't allocate memory|not enough memory|unable to find an engine|alloc_failed"


def pick_device(cuda, accel, local_rank=0):
    """Return the torch.device for --cuda and --accel: without them, or where --accel finds none, the CPU.

    local_rank: which of several GPUs. Raises UserError if CUDA is asked for and there is none.
    """
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda: torch finds no CUDA device here; leave --cuda out to run on the CPU")
    found = accel and torch.accelerator.current_accelerator(check_available=True)
    if cuda or (found and found.type == "cuda"):
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return found or torch.device("cpu")


def tune_device(device):
    """Set what makes networks fast on `device`, for the whole process.

    On a CPU, glibc returns every large buffer to the system when it is freed, and gets the next one page by page, at
    each layer of each step. Here glibc is told to keep them. On CUDA, cuDNN times its kernels and uses the fastest.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(option, value)


def free_memory(device):
    """Return how many bytes of an accelerator's memory are free, or ASSUMED_FREE where it does not tell."""
    try:
        return torch.accelerator.get_memory_info(device)[0]
    except (AttributeError, RuntimeError, NotImplementedError):
        return ASSUMED_FREE


def to_device(batch, device):
    """Return a batch on `device`. A copy to a CUDA device does not wait for the step before."""
    if device.type == "cuda" and not batch.is_cuda:
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def copy_to_cpu(tree):
    """Return a copy of a nested state (dictionaries, lists, tuples) with all tensors contiguous on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    return type(tree)(map(copy_to_cpu, tree)) if isinstance(tree, list | tuple) else tree


def fastest_memory_format(device):
    """Return the memory format in which a network is fastest on `device`."""
    # On mps, the gradient of batch norm is wrong in channels-last (pytorch issue 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def default_precision(device):
    """Return "bf16" where a CUDA GPU computes in bfloat16, else "fp32"."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def cpu_has_bfloat16():
    """Return True if the CPU computes in bfloat16, False if PyTorch only emulates it (slowly), None if not known."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.12 does not tell
    return capabilities.get("avx512_bf16")


def why_not_compile(device):
    """Return in one line why torch.compile does not work here, such as a missing C++ compiler; None if it does."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(4, device=device))
    except Exception as error:  # the compilers behind it raise exceptions of many kinds
        return error_text(str(error).split("\n\n")[0])


def reproducible_kernels():
    """Return a context in which cuDNN's results do not differ from one process to the next on the same device.

    Its kernels are deterministic, chosen by rule instead of by timing, and compute in full float32, not in TF32.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def is_out_of_memory(error):
    """Return whether an exception means that the memory of a device, or of the CPU, is too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or isinstance(error.__context__, MemoryError):
        return True
    return bool(re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE))
