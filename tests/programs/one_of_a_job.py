"""One of the processes of a job: exit with a code, or wait for a signal, and exit only a while after it.

python one_of_a_job.py FOLDER wait    # writes FOLDER/<rank>.ready, holding its process id, then FOLDER/<rank>.saved
python one_of_a_job.py FOLDER 3       # rank 1 exits with 3
"""

import os
import sys
import time
from pathlib import Path

from support.signals import StopSignal

folder, what = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2"
if what != "wait":
    sys.exit(int(what) if rank == "1" else 0)
with StopSignal(ignore_repeats=True) as stop:
    (folder / f"{rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank}.part").rename(folder / f"{rank}.ready")
    since = time.monotonic()
    while not stop.received and time.monotonic() - since < 60:
        time.sleep(0.01)
    time.sleep(0.5)  # while the launcher repeats the signal
    (folder / f"{rank}.saved").touch()
sys.exit(128 + stop.received)
