"""Get two signals where the first cannot be announced: standard error is closed, or a full pipe that nobody reads."""

import contextlib
import os
import signal
import sys
import threading

from support.signals import StopSignal

if sys.argv[1] == "full":
    os.set_blocking(2, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(2, b"x" * 4096)
    os.set_blocking(2, True)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()  # while the announcement of the first waits

with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("stored" if stop.received == signal.SIGTERM else "lost", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there", flush=True)
