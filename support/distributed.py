"""Several processes, of which torch's launcher started each; without it, all of this is about one alone."""

import datetime
import logging
import os
import signal
import sys
import tempfile

import torch
import torch.distributed as dist


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
