"""Signals that stop a run after its step."""

import signal


class StopOnSignal:
    """While open, the first SIGINT, SIGTERM or SIGHUP waits in `received` for the loop to see; a second ends all.

    One that the caller has us ignore, as nohup does SIGHUP, stays ignored. patient: a second ends nothing, for a
    launcher of several processes passes on what the terminal has already sent to each, and ends them if they linger.
    """

    def __init__(self, patient=False):
        self.patient = patient

    def __enter__(self):
        self.received, names = 0, ("SIGINT", "SIGTERM", "SIGHUP")
        known = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
        handlers = {signum: signal.getsignal(signum) for signum in known}
        self.before = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}
        for signum in self.before:
            signal.signal(signum, self._receive)
        return self

    def _receive(self, received, _):
        self.received = received
        for signum in () if self.patient else self.before:
            signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
