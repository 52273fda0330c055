"""Run generate.py for 100 and then for 800 images, in folders of these names; print the peaks of memory in MB."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from memory import peak_memory

import generate

for count in ("100", "800"):
    generate.main(["--load_path", sys.argv[1], "--outf", count, "--num_output", count])
    print("peak", peak_memory() // 1024)
