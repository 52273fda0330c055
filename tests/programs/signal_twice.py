"""Receive SIGTERM twice: the second time ends the process."""

import signal

from support.signals import StopSignal

with StopSignal():
    signal.raise_signal(signal.SIGTERM)
    print("stored", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("still there", flush=True)
