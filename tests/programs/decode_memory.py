"""Decode the images of a folder; print by how many MB the peak of memory grew, and the images that were skipped."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from memory import peak_memory

from data import load_images

before = peak_memory()
images = load_images("folder", sys.argv[1], 64, cache="none")
list(images.batches(4, 0, 0))
print((peak_memory() - before) // 1024, images.skipped)
