"""Start processes as Windows and macOS do: with this folder in PYTHONPATH, every Python process reads this file."""

import multiprocessing

multiprocessing.set_start_method("spawn")
