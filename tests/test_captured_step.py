"""The captured step, with stand-ins for CUDA's streams and graphs."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, random_batches, small_trainer
from torch.torch_version import TorchVersion

import training as training_module
from support import captured_step
from support.captured_step import WARM_UP, CapturedStep
from training import Trainer

BATCH = 6
RANDOM = {"flip": True, "augment": "color,translation,cutout"}  # all that draws random numbers in a step


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

    def reset(self):
        self.was_reset = True

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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
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


@pytest.mark.parametrize(("rank", "warning"), [(0, "another process could not capture its step"), (1, None)])
def test_no_process_replays_a_graph_where_another_has_none(monkeypatch, capsys, rank, warning):
    """Only the first process says so."""
    monkeypatch.setattr(captured_step, "all_reduce_max", lambda failed: 1)
    cuda, plain = Cuda(monkeypatch), plain_trainer()
    cuda.trainer.rank = rank
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 3))
    assert len(cuda.graphs) == 1
    assert cuda.trainer.captured_step.graph is None
    said = f"warning: no CUDA graph, so training is slower ({warning})\n" if warning else ""
    assert capsys.readouterr().err == said


def test_a_closed_trainer_holds_no_graph(monkeypatch):
    """NCCL would wait for the graph for ever when the process leaves its group. Steps can still be taken."""
    cuda, plain = Cuda(monkeypatch), plain_trainer()
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    cuda.trainer.close()  # before any capture
    assert waited == []
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 2))
    cuda.trainer.close()
    assert cuda.graphs[0].was_reset
    assert waited == [cuda.trainer.device]
    assert cuda.trainer.captured_step.graph is None
    assert_equal_steps(cuda.trainer, plain, random_batches(2, seed=4))
    assert len(cuda.graphs) == 1


@pytest.mark.parametrize(("kind", "version"), [(OldGraph, "2.10.0"), (OldGraph, "2.13.1+cu130"), (Graph, "2.14.0")])
def test_the_generator_is_registered_before_pytorch_2_14_alone(monkeypatch, kind, version):
    """Later versions register it by themselves; their graph need not have the function."""
    cuda, plain = Cuda(monkeypatch, kind, version), plain_trainer()
    assert_equal_steps(cuda.trainer, plain, random_batches(WARM_UP + 2))
    assert getattr(cuda.graphs[0], "registered", None) is (cuda.trainer.rng if kind is OldGraph else None)


@pytest.mark.parametrize(("device", "capturing"), [("cuda", True), ("cuda", False), ("cpu", False)])
def test_a_branch_of_a_graph_waits_for_what_is_before_it_and_is_waited_for(monkeypatch, device, capturing):
    """Its block is on a stream of its own, in a capture alone."""
    cuda, order = Cuda(monkeypatch), []
    cuda.current.capturing = capturing
    monkeypatch.setattr(Stream, "wait_stream", lambda stream, other: order.append((stream, other)))
    with captured_step.graph_branch(torch.device(device)) as join:
        side = cuda.current
    assert cuda.current is cuda.default
    assert order == ([(side, cuda.default)] if capturing else [])
    join()
    assert order[1:] == ([(cuda.default, side)] if capturing else [])
    assert (side is not cuda.default) == capturing


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
