"""Devices, their memory and precision; and the captured step, with stand-ins for CUDA's streams and graphs."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_same, random_batches, small_trainer
from torch.torch_version import TorchVersion

import training as training_module
from models import Generator, generate_images, latents
from support.accelerator import (
    ASSUMED_FREE,
    WARM_UP,
    CapturedStep,
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
from training import Trainer

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


# The captured step


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, device=None):
        self.capturing = False

    def wait_stream(self, stream):
        pass

    def is_capturing(self):
        return self.capturing


class Graph:
    """Stands in for torch.cuda.CUDAGraph of PyTorch 2.14: replaying it takes the step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def replay(self):
        captured = self.trainer.captured_step
        captured.result.copy_(self.trainer.eager_step(captured.batch))


class OldGraph(Graph):
    """One of PyTorch before 2.14."""

    def register_generator_state(self, generator):
        self.registered = generator


class Cuda:
    """Stands in for torch.cuda. As on a device, a capture executes nothing: what the step changes is put back.

    fail: the error that a capture raises `where` it "begins", "computes" or "ends". As before PyTorch 2.14, its stream
    then stays current, and the generator of the noise cannot be used any more.
    """

    def __init__(self, monkeypatch, kind=Graph, version="2.14.1", fail=None, where="computes"):
        self.kind, self.fail, self.where = kind, fail, where
        self.default = self.current = Stream()
        self.graphs, self.capturable = [], set()
        for name in ("stream", "graph", "current_stream", "set_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        # Adam looks here whether it is captured.
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
        )
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current.capturing)
        self.train_step = training_module.train_step
        monkeypatch.setattr(training_module, "train_step", self.step)
        monkeypatch.setattr(Trainer, "new_captured_step", lambda trainer: CapturedStep(trainer))
        self.trainer = small_trainer(shard_size=BATCH, **RANDOM)

    def step(self, *arguments):
        for optimizer in (self.trainer.optimizerG, self.trainer.optimizerD):
            self.capturable.add((self.current.capturing, optimizer.param_groups[0]["capturable"]))
        result = self.train_step(*arguments)
        self.fail_if("computes")
        return result

    def fail_if(self, where):
        if self.fail and self.where == where and self.current.capturing:
            raise self.fail

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def CUDAGraph(self):
        self.graphs.append(self.kind(self.trainer))
        return self.graphs[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        trainer = self.trainer
        optimizers, before = (trainer.optimizerG, trainer.optimizerD), self.current
        tensors = [t for net in trainer.networks().values() for t in net.state_dict().values()]
        tensors += [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
        values, noise = [t.clone() for t in tensors], trainer.rng.get_state()
        self.current, stream.capturing = stream, True
        try:
            self.fail_if("begins")
            yield
            self.fail_if("ends")
            trainer.rng.set_state(noise)
            self.current = before
        except BaseException:
            trainer.rng.manual_seed(666)
            raise
        finally:
            stream.capturing = False
            for t, value in zip(tensors, values, strict=True):
                t.detach().copy_(value)


def plain_trainer():
    return small_trainer(**RANDOM)  # no batch is one of its whole batches, so none of its steps is captured


def assert_equal_steps(trainer, plain, batches):
    for batch in batches:
        assert torch.equal(trainer.step(batch), plain.step(batch))
    assert_same(trainer.state_dict(), plain.state_dict())


def test_captured_steps_equal_plain_ones(monkeypatch, capsys, recwarn):
    """After a warm-up; smaller batches between them are not captured. Adam warns nobody, and refuses nothing."""
    cuda, plain = Cuda(monkeypatch), plain_trainer()
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP))
    assert cuda.graphs == []
    assert_equal_steps(cuda.trainer, plain, random_batches(1, seed=4))
    assert len(cuda.graphs) == 1
    assert_equal_steps(cuda.trainer, plain, random_batches(2, seed=5))
    assert_equal_steps(cuda.trainer, plain, random_batches(1, size=2) + random_batches(2, seed=6))
    assert len(cuda.graphs) == 1
    assert cuda.trainer.captured_step.graph is cuda.graphs[0]
    assert cuda.current is cuda.default
    assert cuda.capturable == {(False, False), (True, True)}
    output = capsys.readouterr()
    assert "warning" not in (output.out + output.err).lower()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_captured_result_is_not_overwritten(monkeypatch):
    cuda = Cuda(monkeypatch)
    results = [cuda.trainer.step(batch) for batch in random_batches(WARM_UP + 3)]
    assert len({tuple(result.tolist()) for result in results}) == WARM_UP + 3


def test_training_resumed_after_a_capture_equals_unbroken_training(monkeypatch):
    cuda, plain = Cuda(monkeypatch), plain_trainer()
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 2))
    state = cuda.trainer.state_dict()
    assert not any(state[name]["param_groups"][0]["capturable"] for name in ("optimizerG", "optimizerD"))
    for batch in random_batches(2, seed=9):
        cuda.trainer.step(batch)
    cuda.trainer.load_state_dict(state)  # what was captured holds tensors that this replaces
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 2, seed=4))
    assert len(cuda.graphs) == 2


@pytest.mark.parametrize("where", ["begins", "computes", "ends"])
def test_training_goes_on_where_a_capture_fails(monkeypatch, capsys, recwarn, where):
    error = RuntimeError("operation not permitted\nwhen stream is capturing")
    cuda, plain = Cuda(monkeypatch, fail=error, where=where), plain_trainer()
    noise = cuda.trainer.rng
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP))
    assert cuda.trainer.rng is noise
    assert_equal_steps(cuda.trainer, plain, random_batches(4, seed=4))
    assert cuda.current is cuda.default
    assert cuda.trainer.rng is not noise
    assert len(cuda.graphs) == 1  # it is tried once
    assert cuda.trainer.captured_step.graph is None
    assert cuda.capturable <= {(False, False), (True, True)}
    assert capsys.readouterr().err == (
        "warning: no CUDA graph, so training is slower (operation not permitted when stream is capturing)\n"
    )
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_in_a_capture_is_raised(monkeypatch, capsys, error):
    cuda = Cuda(monkeypatch, fail=error)
    *warm_up, captured = random_batches(WARM_UP + 1)
    for batch in warm_up:
        cuda.trainer.step(batch)
    with pytest.raises(type(error)) as caught:
        cuda.trainer.step(captured)
    assert caught.value is error
    assert cuda.current is cuda.default
    assert not cuda.trainer.optimizerG.param_groups[0]["capturable"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("kind", "version"), [(OldGraph, "2.10.0"), (OldGraph, "2.13.1+cu130"), (Graph, "2.14.0")])
def test_the_generator_is_registered_before_pytorch_2_14_alone(monkeypatch, kind, version):
    """Later versions register it by themselves; their graph need not have the function."""
    cuda, plain = Cuda(monkeypatch, kind, version), plain_trainer()
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 2))
    assert getattr(cuda.graphs[0], "registered", None) is (cuda.trainer.rng if kind is OldGraph else None)


@pytest.mark.parametrize(
    ("device", "world_size", "backends", "captured"),
    [
        ("cpu", 1, None, False),
        ("mps", 1, None, False),
        ("cuda", 1, None, True),
        ("cuda", 2, "cpu:gloo,cuda:nccl", True),
        ("cuda", 2, "cpu:gloo,cuda:gloo", False),
        ("cpu", 2, "cpu:gloo,cuda:nccl", False),
    ],
)
def test_steps_are_captured_on_cuda_alone_with_no_all_reduce_but_nccls(
    monkeypatch, device, world_size, backends, captured
):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    trainer = SimpleNamespace(device=torch.device(device), world_size=world_size)
    assert isinstance(Trainer.new_captured_step(trainer), CapturedStep) == captured
