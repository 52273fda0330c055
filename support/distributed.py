"""Several processes, started by torch's launcher. In a single process, every function here also works."""

import contextlib
import datetime
import logging
import os
import re
import signal
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist

LOST_PROCESS = "closed by peer|reset by peer|remote process exited|Broken pipe|Connection refused"


def init_distributed(timeout_hours=6):
    """Join the processes of a job that a launcher has started; return (rank, world size), (0, 1) without one.

    timeout_hours: how long to wait for the others, one of which may be preparing images.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        timeout = datetime.timedelta(hours=timeout_hours)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # A restarted job may find the addresses of the one before in the store.
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}-{world_size}", store)
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return rank_and_world_size()


def run_and_exit(main):
    """Exit with the code that main() returns; in a job of several processes, leave the process group first.

    When a collective has returned, a thread of gloo's still drops its tensors, for which it needs the interpreter. If
    that is shutting down, the thread aborts the process with exit code 134 (pytorch issue 190489). Destroying the
    process group waits for such threads. A process that failed waits for nobody, since NCCL could wait for ever.
    """
    succeeded = False
    try:
        code = main()
        succeeded = code not in (1, 2)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if dist.is_available() and dist.is_initialized():
        if not succeeded:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


def rank_and_world_size():
    """Return (the number of this process, how many there are)."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def is_lost_process(error):
    """Return whether `error` comes from the end of another process of the job."""
    return rank_and_world_size()[1] > 1 and bool(re.search(LOST_PROCESS, str(error)))


def shard(items, rank, world_size):
    """Return the part of `items` that belongs to process `rank`: equal parts, in order; a remainder belongs to none."""
    size = len(items) // world_size
    return items[rank * size : (rank + 1) * size]


def all_gather_object(value):
    """Return the list of every process's `value`."""
    values = [value] * rank_and_world_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def local_main_process_first():
    """Let the first process of each machine run the block before the others do, so that they find its results."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        all_gather_object(None)  # wait for the first process
    yield
    if is_first:
        all_gather_object(None)


def broadcast_object(value):
    """Return the `value` of rank 0."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_reduce_max(number):
    """Return the largest of all processes' whole numbers."""
    if rank_and_world_size()[1] == 1:
        return number
    values = torch.tensor(number)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def all_reduces_with_nccl():
    """Return whether the processes of a job exchange CUDA tensors through NCCL (on Windows there is only gloo)."""
    return "cuda:nccl" in dist.get_backend_config()


def all_reduce_mean(values):
    """Return the mean of a tensor over all processes, computed in place."""
    world_size = rank_and_world_size()[1]
    if world_size > 1:
        dist.all_reduce(values)
        values /= world_size
    return values


def average_gradients(net):
    """Replace a network's gradients by their means over all processes, in one all-reduce.

    The order in which three or more processes are summed depends on a number's position in the buffer. Here the
    positions never change, so a resumed run adds in the same order.
    """
    if rank_and_world_size()[1] == 1:
        return
    gradients = [weight.grad for weight in net.parameters()]
    means = all_reduce_mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def launch_processes(world_size, script, argv):
    """Run a script in `world_size` processes on this machine with torch's launcher; return its exit code."""
    logging.disable(logging.ERROR)  # the launcher's own messages; the processes print theirs
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in; 30 in PyTorch before 2.13
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    names = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]  # as under nohup
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    with tempfile.TemporaryDirectory() as logs:
        settings |= {"logs_specs": DefaultLogsSpecs(log_dir=logs), "signals_to_handle": ",".join(names)}
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=world_size, max_restarts=0, **settings)
        try:
            elastic_launch(config, sys.executable)(script, *argv)
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as failure:
            code = min(process.exitcode for process in failure.failures.values())
            if code > 0:
                return code
            program, name = os.path.basename(script), signal.Signals(-code).name
            print(f"{program}: {name} has killed a process of this job; saved files are intact", file=sys.stderr)
            return 128 - code  # as a shell reports it
    return 0
