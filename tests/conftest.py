import signal

import pytest
import torch
from helpers import RUN, finish, start

torch.set_num_threads(1)  # with more, networks this small wait for each other on a busy machine


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Undo what nohup and a shell's background jobs ignore: the tests' processes would ignore it too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a run of RUN that was never stopped; tests leave it as it is."""
    base = tmp_path_factory.mktemp("unbroken")
    finish(start(base / "run", "dcgan.py", *RUN))
    return base / "run" / "out"
