"""Take the lock of the file argv[1], print a line, and hold the lock until standard input ends."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.files import try_lock

lock = try_lock(sys.argv[1])
print("refused" if lock is None else "held", flush=True)
sys.stdin.read()
