"""Both programs on a simulated accelerator, in a process of its own: a process that has it cannot fork any more."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT


def test_both_programs_run_on_a_simulated_accelerator():
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rA", "tests/simulated_checks.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
    assert len(re.findall("^PASSED ", done.stdout, re.MULTILINE)) >= 31
