"""Devices, their memory, precision and kernels."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from models import Generator, generate_images, latents
from support.accelerator import (
    ASSUMED_FREE,
    copy_to_cpu,
    cpu_has_bfloat16,
    default_precision,
    fastest_memory_format,
    free_memory,
    is_out_of_memory,
    pick_device,
    why_not_compile,
)
from support.errors import UserError

BATCH = 6
RANDOM = {"flip": True, "augment": "color,translation,cutout"}  # all that draws random numbers in a step


# Devices


def test_the_device_that_is_asked_for_is_picked(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device(False, False) == pick_device(False, True) == torch.device("cpu")
    with pytest.raises(UserError, match="--cuda: torch finds no CUDA device here"):
        pick_device(True, False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert pick_device(False, True) == torch.device("mps")
    assert pick_device(False, False) == torch.device("cpu")
    assert chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert pick_device(True, False) == torch.device("cuda", 0)
    assert pick_device(False, True, local_rank=2) == torch.device("cuda", 2)
    assert chosen == [0, 2]


def test_channels_last_is_used_where_its_gradients_are_right():
    layouts = {name: fastest_memory_format(torch.device(name)) for name in ("cpu", "cuda", "xpu", "mps")}
    assert layouts.pop("mps") == torch.contiguous_format
    assert set(layouts.values()) == {torch.channels_last}


def test_default_precision(monkeypatch):
    assert default_precision(torch.device("cpu")) == "fp32"
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert default_precision(torch.device("cuda")) == precision
        assert default_precision(torch.device("mps")) == "fp32"


def test_bfloat16_arithmetic_is_known_where_pytorch_tells(monkeypatch):
    for capabilities in ({"avx512_bf16": False}, {"avx512_bf16": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert cpu_has_bfloat16() is capabilities.get("avx512_bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of PyTorch before 2.12
    assert cpu_has_bfloat16() is None


def test_why_not_compile_is_one_line(monkeypatch):
    def fail(*_):
        raise ValueError("no compiler:\n" + "looked for it " * 100 + "\n\na long explanation")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    why = why_not_compile(torch.device("cpu"))
    assert why.startswith("no compiler: looked for it looked")
    assert len(why) <= 200
    assert "\n" not in why
    assert "explanation" not in why
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert why_not_compile(torch.device("cpu")) is None


def test_copies_on_the_cpu_are_contiguous_and_share_nothing():
    strided = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    tree = {"a": strided, "b": [torch.arange(3), (torch.tensor(1.5), None)], 4: {"lr": 0.1, "betas": (0.5, 0.999)}}
    copied = copy_to_cpu(tree)
    assert list(copied) == ["a", "b", 4]
    assert torch.equal(copied["a"], strided)
    assert copied["a"].is_contiguous()
    assert not copied["a"].requires_grad
    assert copied["b"][0].tolist() == [0, 1, 2]
    assert copied["b"][0].data_ptr() != tree["b"][0].data_ptr()
    assert isinstance(copied["b"][1], tuple)
    assert copied["b"][1] == (torch.tensor(1.5), None)
    assert copied[4] == tree[4]
    with torch.no_grad():
        strided.zero_()
    assert copied["a"].abs().sum() > 0


# Memory


def test_free_memory_is_what_the_accelerator_tells(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (5, 10), raising=False)
    assert free_memory(torch.device("cuda")) == 5


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_free_memory_is_assumed_where_the_accelerator_does_not_tell(monkeypatch, error):
    def fail(device):
        raise error("not here")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", fail, raising=False)
    assert free_memory(torch.device("mps")) == ASSUMED_FREE == 3 * 2**30
    monkeypatch.delattr(torch.accelerator, "get_memory_info")  # of PyTorch before 2.9
    assert free_memory(torch.device("mps")) == ASSUMED_FREE


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    torch.OutOfMemoryError("Allocation on device"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=str)
def test_other_errors_are_not_taken_for_too_little_memory(error):
    assert not is_out_of_memory(error)


def test_too_little_memory_of_the_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns buffers to the system")
def test_freed_buffers_are_kept():
    """A step takes thousands of new pages from the system, unless freed buffers are kept."""
    program = [sys.executable, ROOT / "tests" / "programs" / "count_page_faults.py"]
    output = subprocess.check_output(program, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, timeout=100)
    untuned, tuned = json.loads(output)
    assert tuned < untuned / 10


# Kernels


def test_images_are_generated_with_reproducible_kernels(monkeypatch):
    cudnn, names, seen = torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32"), []
    monkeypatch.setattr(cudnn, "benchmark", True)  # as tune_device sets it
    before = [getattr(cudnn, name) for name in names]
    netG = Generator(4, 4, 3, 16)
    netG.main[0].register_forward_hook(lambda *_: seen.append([getattr(cudnn, name) for name in names]))
    generate_images(netG, latents(range(3), 4))
    assert seen == [[True, False, True, False]]
    assert [getattr(cudnn, name) for name in names] == before
