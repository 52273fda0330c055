"""Signals: those that come while the program still starts, and those that stop a run after its current step."""

import contextlib
import os
import signal
import sys


def interrupt_quietly(quietly):
    """Let Ctrl-C end the process silently, or raise KeyboardInterrupt as usual. If it is ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.SIG_DFL if quietly else signal.default_int_handler)


class StopSignal:
    """While open, the newest SIGINT, SIGTERM or SIGHUP is stored in `received`; a second one ends the process.

    The first is announced, because its step may take a while.
    A signal that the caller has set to be ignored, as nohup does with SIGHUP, stays ignored.

    ignore_repeats: a second signal ends nothing, and none is announced. In a job of several processes, the launcher
    sends each process again what the terminal has already sent, and ends those that take too long.
    """

    def __init__(self, ignore_repeats=False):
        self.ignore_repeats = ignore_repeats

    def __enter__(self):
        self.received, names = 0, ("SIGINT", "SIGTERM", "SIGHUP")
        known = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
        handlers = {signum: signal.getsignal(signum) for signum in known}
        self.before = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}
        for signum in self.before:
            signal.signal(signum, self.receive)
        return self

    def receive(self, received, _):
        self.received = received
        if self.ignore_repeats:
            return
        for signum in self.before:
            signal.signal(signum, signal.SIG_DFL)
        name = signal.Signals(received).name
        text = f"\n{name}: finishing this step, then saving; the next signal ends the program at once, without saving\n"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stream any more
            os.write(sys.__stderr__.fileno(), text.encode())  # print may have been interrupted itself

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
