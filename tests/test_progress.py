"""support/progress.py: what a run says of its progress, and when D has won."""

from types import SimpleNamespace

import pytest
from helpers import SMALL, run_dcgan
from torch import nn
from tqdm import tqdm

import support.progress
from support.progress import BAR_FORMAT, D_wins, bar_text, describe_length, describe_processes, epoch_summary, hint


def rows_of(steps, D_G_z1, loss_G):
    return [{"step": s, "D_G_z1": D_G_z1, "loss_G": loss_G(s)} for s in range(10, steps + 1, 10)]


@pytest.mark.parametrize(
    ("rows", "wins"),
    [
        (rows_of(2000, 0.01, lambda step: step), True),
        (rows_of(2000, 0.03, lambda step: step), False),  # D is not sure
        (rows_of(1600, 0.03, lambda step: step) + rows_of(2000, 0.01, lambda step: step)[160:], False),  # not for long
        (rows_of(1400, 0.03, lambda step: step) + rows_of(2000, 0.01, lambda step: step)[140:], True),
        (rows_of(2000, 0.01, lambda step: -step), False),  # G recovers
        (rows_of(300, 0.01, lambda step: step), False),  # too soon
        (rows_of(2000, 0.01, lambda step: step)[-1:], False),
    ],
)
def test_D_wins_where_it_recognises_all_of_G_for_500_steps_and_G_gets_worse(rows, wins):
    assert D_wins(rows) == wins


def test_an_epoch_is_summarised_by_the_means_over_its_rows():
    names = ("loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "images_per_s")
    rows = [{"epoch": epoch} | {name: 8.0 * epoch + i for i, name in enumerate(names)} for epoch in (0, 1, 1, 2)]
    rows[1] |= {name: rows[1][name] + 1 for name in names}
    means = "loss_D 8.500, loss_G 9.500, D(x) 10.500, D(G(z)) 11.500 / 12.500, 14 images/s"
    assert epoch_summary(rows, 2, 12) == f"epoch 2/12: {means}"


@pytest.mark.parametrize(
    ("device", "captured", "end"), [("cpu", None, ""), ("cuda", "a graph", ""), ("cuda", None, "; without CUDA graphs")]
)
def test_processes_tell_their_share_and_whether_cuda_graphs_are_missing(capsys, device, captured, end):
    trainer = SimpleNamespace(device=SimpleNamespace(type=device), captured_step=captured)
    describe_processes(SimpleNamespace(args=SimpleNamespace(batch_size=12), world_size=4, trainer=trainer))
    assert capsys.readouterr().out == f"4 processes with 3 images each per step{end}\n"


def test_the_bar_shows_losses_and_probabilities():
    means = {"loss_D": 1.25, "loss_D_real": 0.5, "loss_D_fake": 0.75, "loss_G": 2.0}
    means |= {"D_x": 0.6, "D_G_z1": 0.4, "D_G_z2": 0.3, "images_per_s": 9.0}
    assert bar_text(means) == "D 1.25 G 2.00 D(x) 0.60 D(G(z)) 0.40/0.30"


def test_a_terminal_of_80_columns_shows_the_losses_and_all_probabilities():
    means = {"loss_D": 1.25, "loss_G": 12.0, "D_x": 0.6, "D_G_z1": 0.4, "D_G_z2": 0.3}
    state = {"n": 3_000_000, "total": 6_000_000, "elapsed": 9000, "ncols": 79, "unit": "img", "rate": 1234.5}
    text = tqdm.format_meter(**state, prefix="epoch 100/200", postfix=bar_text(means), bar_format=BAR_FORMAT)
    assert text.startswith("epoch 100/200, D 1.25 G 12.00 D(x) 0.60 D(G(z)) 0.40/0.30 50% |")
    assert len(text) <= 79


@pytest.mark.parametrize(
    ("precision", "ngf", "has_bfloat16", "words"),
    [
        ("fp32", 32, True, "note: this CPU has bfloat16 arithmetic"),
        ("fp32", 16, True, None),  # it gains too little
        ("bf16", 32, False, "note: --precision bf16: this CPU has no bfloat16 arithmetic"),
        ("fp32", 32, False, None),
        ("bf16", 32, True, None),
        ("fp32", 32, None, None),  # PyTorch does not tell
        ("bf16", 32, None, None),
    ],
)
def test_the_faster_precision_of_a_cpu_is_named(tmp_path, monkeypatch, capsys, precision, ngf, has_bfloat16, words):
    monkeypatch.setattr(support.progress, "cpu_has_bfloat16", lambda: has_bfloat16)
    options = [*SMALL.split(), "--workers", 0, "--batchSize", 8, "--dry-run", "--ngf", ngf, "--ndf", 32]
    options += ["--precision", precision]
    assert run_dcgan(tmp_path / "out", *options) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "bfloat16" in line]
    assert len(notes) == bool(words)
    assert all(note.startswith(words) for note in notes)


@pytest.mark.parametrize(
    ("niter", "steps_per_epoch", "options", "lines"),
    [
        (25, 80, {}, ["2,000 steps in 25 epochs; weights of 25 checkpoints: 100 MB"]),
        (25, 1, {}, ["25 steps in 25 epochs; weights of 25 checkpoints: 100 MB", "--niter 2000 --save-every 80"]),
        (2, 469, {}, ["938 steps in 2 epochs; weights of 2 checkpoints: 8 MB", "for example with --niter 5"]),
        (1, 9999, {}, ["9,999 steps in 1 epoch; weights of 1 checkpoint: 4 MB"]),
        (2000, 9, {}, ["18,000 steps in 2,000 epochs; weights of 2,000 checkpoints: 8.03 GB", "--keep N"]),
        (2000, 9, {"save_every": 3}, ["18,000 steps in 2,000 epochs; weights of 667 checkpoints: 2.68 GB"]),
        (
            2000,
            9,
            {"keep": 10},
            ["18,000 steps in 2,000 epochs; weights of the newest 10 of 2,000 checkpoints: 40 MB"],
        ),
    ],
)
def test_steps_and_size_are_told_and_what_helps_if_they_are_few_or_much(niter, steps_per_epoch, options, lines, capsys):
    """Of networks whose weights take 4 MB and 15 KB in all."""
    args = SimpleNamespace(niter=niter, **({"save_every": 1, "keep": 0} | options))
    trainer = SimpleNamespace(networks=lambda: {"netG": nn.Linear(1000, 1003), "netD": nn.Flatten()})
    describe_length(SimpleNamespace(args=args, steps_per_epoch=steps_per_epoch, trainer=trainer))
    for line, words in zip(capsys.readouterr().out.splitlines(), lines, strict=True):
        assert line.endswith(words) or (line.startswith("note: ") and words in line)


def test_the_hint_does_not_recommend_what_the_run_has():
    assert "Try --augment translation first, in a new run; then more images" in hint("none")
    assert "learns little. Try more images, a smaller --ndf" in hint("color,translation")
