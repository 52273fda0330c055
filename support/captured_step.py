"""A training step as one CUDA graph."""

import contextlib
import functools
import sys
import warnings

import torch

from support.accelerator import is_out_of_memory
from support.distributed import all_reduce_max
from support.errors import error_text

WARM_UP = 3  # steps before one is captured: the libraries choose their kernels, and Adam makes its state


class CapturedStep:
    """A Trainer's step for batches of one shape on a CUDA device, as one CUDA graph: one launch instead of hundreds.

    The first WARM_UP calls run `trainer.eager_step` as it is. The next captures it, which executes nothing, and replays
    the graph, as all later calls do. Where it cannot be captured, it warns once and continues with eager steps.
    """

    def __init__(self, trainer):
        self.trainer, self.stream = trainer, torch.cuda.Stream(trainer.device)
        self.calls, self.graph, self.can_capture = 0, None, True

    def __call__(self, batch):
        self.calls += 1
        if self.calls > WARM_UP and self.can_capture and not self.graph:
            self.capture(batch)
        if self.graph:
            self.batch.copy_(batch, non_blocking=True)
            self.graph.replay()
            return self.result.clone()  # the next replay overwrites it
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.trainer.eager_step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, batch):
        """Capture a step, in all processes or in none. Raises what a lack of memory raises."""
        trainer, graph, failure = self.trainer, torch.cuda.CUDAGraph(), None
        stream, rng_state = torch.cuda.current_stream(), trainer.rng.get_state()
        # From PyTorch 2.14 on, a capture registers every generator that it uses.
        if torch.__version__ < (2, 14) and hasattr(graph, "register_generator_state"):
            graph.register_generator_state(trainer.rng)
        self.batch = torch.empty_like(batch, device=trainer.device)
        self.set_capturable(True)
        try:
            # thread_local: what other threads do, such as NCCL's watchdog, does not end the capture.
            with (
                warnings.catch_warnings(),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                # D's gradients come from two streams, as they should: see graph_branch.
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
                self.result = trainer.eager_step(self.batch)
        except RuntimeError as error:
            # Before PyTorch 2.14, a failed capture leaves its stream current and the generator in capturing state.
            torch.cuda.set_stream(stream)
            trainer.rng = torch.Generator(trainer.device)
            trainer.rng.set_state(rng_state)
            failure = error
        finally:
            self.set_capturable(False)
        if not all_reduce_max(int(failure is not None)):
            self.graph = graph
            return
        self.can_capture = False
        if failure and is_out_of_memory(failure):
            raise failure
        if trainer.rank == 0:
            reason = error_text(failure) if failure else "another process could not capture its step"
            print(f"warning: no CUDA graph, so training is slower ({reason})", file=sys.stderr)

    def release(self):
        """Free the graph. A process cannot leave NCCL's process group while a graph holds one of its all-reduces."""
        if self.graph:
            torch.cuda.synchronize(self.trainer.device)
            self.graph.reset()
            self.graph, self.can_capture = None, False

    def set_capturable(self, value):
        """Tell Adam whether its step is being captured: it fails in a capture without this, and warns outside with it.

        A fused Adam computes the same either way: its count of steps is on the device in both cases.
        """
        for optimizer in (self.trainer.optimizerG, self.trainer.optimizerD):
            for group in optimizer.param_groups:
                group["capturable"] = value


@contextlib.contextmanager
def graph_branch(device):
    """While a CUDA graph is captured, make this block, and its part of the gradients, a branch of the graph.

    A GPU can then compute it at the same time as what follows the block, up to the call of the function that this
    context returns. Without a capture, nothing changes.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield functools.partial(main.wait_stream, side)
