"""Run dcgan.py with the arguments after the first one: how many MB it may take for its work."""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import dcgan

pages = int(Path("/proc/self/statm").read_text().split()[0])  # of address space, which the imports have taken
limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(dcgan.main(sys.argv[2:]))
