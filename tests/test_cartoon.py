"""The cartoon faces that the program draws: each depends on its index alone, and they differ."""

import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from support.cartoon import draw_cartoon


def pixels(index, size):
    return np.asarray(draw_cartoon(index, size)).astype(int)


def test_a_cartoon_depends_on_its_index_alone():
    first = [draw_cartoon(i, 32).tobytes() for i in (5, 2)]
    random.seed(1)
    draw_cartoon(7, 16)
    assert [draw_cartoon(i, 32).tobytes() for i in (2, 5)] == first[::-1]


@pytest.mark.slow
def test_a_cartoon_is_the_same_in_another_process():
    code = "from support.cartoon import draw_cartoon as d; print(*(d(i, 32).tobytes().hex() for i in (5, 2)))"
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.split() == [draw_cartoon(i, 32).tobytes().hex() for i in (5, 2)]


def test_cartoons_differ_and_are_the_same_at_every_size():
    small, large = [pixels(i, 32) for i in range(12)], []
    for i in range(12):
        large.append(np.asarray(draw_cartoon(i, 128).reduce(4)).astype(int))
    distance = np.array([[np.abs(a - b).mean() for b in large] for a in small])
    assert (distance.argmin(1) == range(12)).all()
    assert distance.diagonal().max() < 5 < np.sort(distance, 1)[:, 1].min()
    assert {a.shape for a in small} == {(32, 32, 3)}
    assert min(a.std() for a in small) > 20  # no blank ones
