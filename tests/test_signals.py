"""support/signals.py: the first signal is kept for the end of a step, the second ends the process."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from support.signals import StopSignal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as Linux and macOS have them")
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.mark.parametrize("name", NAMES)
def test_the_first_signal_is_kept_and_the_second_ends_the_process(name):
    signum, numbers = getattr(signal, name), [getattr(signal, other) for other in NAMES]
    before = [signal.getsignal(other) for other in numbers]
    with StopSignal() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signum)
        assert stop.received == signum
        assert [signal.getsignal(other) for other in numbers] == [signal.SIG_DFL] * 3  # whichever comes next
    assert [signal.getsignal(other) for other in numbers] == before


def test_a_second_signal_ends_the_process_at_once():
    program, environment = ROOT / "tests" / "programs" / "signal_twice.py", os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "stored\n", "")


def test_a_patient_one_survives_a_second_signal():
    with StopSignal(ignore_repeats=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


def test_signals_that_the_caller_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
