"""Run dcgan.py as in a terminal, twice: with the arguments given, and then with --resume and an epoch more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import dcgan
from support.cli import protect_output

protect_output()
sys.exit(dcgan.main([*sys.argv[1:], "--niter", "1"]) or dcgan.main(["--resume", "--niter", "2"]))
