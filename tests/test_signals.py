"""support/signals.py: the first signal is kept for the end of a step, the second ends the process."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from support.signals import StopSignal, interrupt_quietly

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
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (-signal.SIGTERM, "stored\n", 2)


@pytest.mark.parametrize("ignore_repeats", [False, True])
def test_the_first_signal_is_announced_where_a_second_ends_the_process(capfd, ignore_repeats):
    with StopSignal(ignore_repeats):
        os.kill(os.getpid(), signal.SIGINT)
        words = "SIGINT: finishing this step, then saving; the next signal ends the program at once, without saving"
        assert capfd.readouterr().err == ("" if ignore_repeats else f"\n{words}\n")


@pytest.mark.parametrize("stream", ["closed", "full"])
def test_an_announcement_that_cannot_be_written_changes_nothing(stream):
    """The first signal is kept, and the second ends the process."""
    program, environment = ROOT / "tests" / "programs" / "signal_announced.py", os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, program, stream]
    if stream == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    reader, writer = os.pipe()
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60)
    finally:
        os.close(reader), os.close(writer)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "stored\n" if stream == "closed" else "")


def test_with_ignore_repeats_a_second_signal_ends_nothing():
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


@pytest.mark.parametrize("program", ["dcgan.py", "generate.py"])
def test_an_interrupt_while_a_program_still_imports_ends_it_without_a_word(tmp_path, program):
    (tmp_path / "torch.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / program], env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # which a shell reports as 130


def test_interrupts_are_as_usual_afterwards_and_stay_ignored():
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, quiet in ((signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, handler)
            interrupt_quietly(True)
            assert signal.getsignal(signal.SIGINT) == quiet
            interrupt_quietly(False)
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
