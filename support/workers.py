"""Batches of any items, computed by several processes, none of which outlives this one."""

import functools
import multiprocessing
import os
import signal
import warnings
from multiprocessing.pool import ThreadPool

from torch.utils.data import DataLoader

from support.errors import error_text
from support.formats import silence_libtiff


def load_batches(source, compute, chunks, workers):
    """Yield compute(chunk) for each of `chunks`, a list of lists of indices, computed by `workers` processes.

    source: the Source that `compute` reads.
    """
    source.prepare_for_workers()
    silence_libtiff()
    start = functools.partial(worker_init, os.getpid())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than CPU cores
            loader = DataLoader(chunks, None, num_workers=workers, collate_fn=compute, worker_init_fn=start)
            batches = start_workers_off_main_thread(loader) if workers else loader
        yield from batches
    except RuntimeError as error:  # one of its processes was killed
        raise ChildProcessError(
            f"decoding images failed ({error_text(error)}); --workers 0 decodes without other processes"
        ) from None
    finally:
        source.close()


def start_workers_off_main_thread(loader):
    """Return iter(loader), created outside the main thread.

    In the main thread, DataLoader installs a SIGCHLD handler that can raise at any point, even while the lock of a
    queue is held, for which DataLoader would then wait for ever. Without it, a lost worker is noticed within seconds.
    """
    thread = ThreadPool(1)
    try:
        return thread.apply(iter, (loader,))
    finally:  # wait, even after Ctrl-C, so that no worker starts later
        thread.close()
        thread.join()


def worker_init(parent, _):
    """Ignore SIGINT, which `parent` handles; exit on SIGTERM; exit now if the parent has ended already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silence_libtiff()  # where this process is no fork
    # DataLoader's workers watch their parent, but would watch another process if it ended before they started.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:
        os._exit(1)
