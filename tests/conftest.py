import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Undo what nohup and a shell's background jobs ignore: the tests' processes would ignore it too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
