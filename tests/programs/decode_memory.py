"""Decode the images of a folder; print by how many MB the peak of memory grew, and the images that were skipped."""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import load_images

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = load_images("folder", sys.argv[1], 64, cache="none")
list(images.batches(4, 0, 0))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, images.skipped)
