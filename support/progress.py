"""What a run prints: options and sizes, progress, a line for each epoch, a hint when D wins, images left out."""

import math
import sys

import torch
from tqdm import tqdm

from support.accelerator import cpu_has_bfloat16
from support.cli import option_name
from support.distributed import all_gather_object
from support.errors import counted

ENOUGH_STEPS = 2000  # after fewer, images are seldom good
LARGE_WEIGHTS = 5  # gigabytes
HINT_STEPS = 500  # steps in a row that D must win
# The losses come first: a narrow terminal cuts off the end.
BAR_FORMAT = "{desc}{postfix} {percentage:.0f}% |{bar}| {elapsed}<{remaining} {rate_fmt}"


def describe(run, resumed):
    """Print the options of a dcgan.Run, its sizes, and notes on what the user may not expect."""
    args, trainer, device = run.args, run.trainer, run.trainer.device
    for name, value in vars(args).items():
        print(f"  {option_name(name):13} {value}")
    sizes = [f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in trainer.networks().items()]
    print(f"{counted(len(run.images), 'image')}; device {device}; parameters: {', '.join(sizes[:2])}")
    if device.type == "cpu" and torch.accelerator.is_available():
        print(f"note: an accelerator is present ({torch.accelerator.current_accelerator()}); --accel would use it")
    elif args.accel and device.type == "cpu":
        print("warning: --accel: torch finds no accelerator; this run is on the CPU", file=sys.stderr)
    if run.world_size > 1:
        describe_processes(run)
    if args.precision == "bf16" and device.type == "cpu" and cpu_has_bfloat16() is False:
        print("note: --precision bf16: this CPU has no bfloat16 arithmetic; fp32 is faster here")
    large = min(args.ngf, args.ndf) >= 32  # smaller networks gain little
    if args.precision == "fp32" and device.type == "cpu" and large and cpu_has_bfloat16():
        print("note: this CPU has bfloat16 arithmetic: --precision bf16 is 1.5 to 1.9 times as fast, and as good")
    if args.resume and not resumed:
        print(f"note: --resume: {args.outf} holds no run yet; this starts one")
    if len(run.images) < args.batch_size:
        print(f"note: fewer images than --batchSize {args.batch_size}: every step uses all {run.images_per_epoch}")
    if not args.dry_run and run.epoch < args.niter:
        describe_length(run)
    if run.epoch >= args.niter:
        done = counted(run.epoch, "epoch")
        print(f"nothing to do: the run in {args.outf} has finished {done}; an --niter above that continues it")
    elif resumed:
        print(f"resuming at epoch {run.epoch + 1}, step {run.epoch_step + 1}; --niter is {args.niter}")
    for note in run.images.notes:
        print(f"note: {note}")
    if run.images.path:
        print(f"prepared images: {run.images.path}")


def describe_processes(run):
    """Print how many images of a batch each process of a dcgan.Run takes, and whether CUDA graphs are missing."""
    share = counted(run.args.batch_size // run.world_size, "image")
    captured = "; without CUDA graphs" if run.trainer.device.type == "cuda" and not run.trainer.captured_step else ""
    print(f"{run.world_size} processes with {share} each per step{captured}")


def describe_length(run):
    """Print how many steps a dcgan.Run takes and the size of its weights, with advice if that is unusual."""
    args, steps = run.args, run.args.niter * run.steps_per_epoch
    saves = math.ceil(args.niter / args.save_every)
    kept = min(saves, args.keep or saves)
    tensors = [t for net in run.trainer.networks().values() for t in net.state_dict().values()]
    gigabytes = kept * sum(t.nbytes for t in tensors) / 1e9
    whose = (
        f"of {counted(saves, 'checkpoint')}" if kept == saves else f"of the newest {kept:,} of {saves:,} checkpoints"
    )
    space = f"{gigabytes:,.2f} GB" if gigabytes >= 1 else f"{max(1, 1000 * gigabytes):,.0f} MB"
    print(f"{counted(steps, 'step')} in {counted(args.niter, 'epoch')}; weights {whose}: {space}")
    if steps < 0.9 * ENOUGH_STEPS:  # the README's first run takes 1,884
        niter = math.ceil(ENOUGH_STEPS / run.steps_per_epoch)
        every = math.ceil(niter / 25)  # about as many saves as by default
        options = f"--niter {niter}" + (f" --save-every {every}" if every > 1 else "")
        print(
            f"note: {steps:,} steps are few: a DCGAN needs about {ENOUGH_STEPS:,} or more, for example with {options}"
        )
    if gigabytes > LARGE_WEIGHTS:
        print("note: these weights take much space; --save-every N saves less often, --keep N keeps the newest N")


def bar_text(means):
    """Return the text to the right of the progress bar: losses, D(x), and D(G(z)) before and after D's update."""
    return "D {loss_D:.2f} G {loss_G:.2f} D(x) {D_x:.2f} D(G(z)) {D_G_z1:.2f}/{D_G_z2:.2f}".format(**means)


def epoch_summary(rows, epoch, niter):
    """Return one line on a finished epoch (1, 2, ...): means over its rows of the log."""
    rows = [row for row in rows if row["epoch"] == epoch - 1]
    names = ("loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "images_per_s")
    means = {name: sum(row[name] for row in rows) / max(1, len(rows)) for name in names}
    return (
        "epoch {}/{}: loss_D {loss_D:.3f}, loss_G {loss_G:.3f}, D(x) {D_x:.3f}, D(G(z)) {D_G_z1:.3f} / {D_G_z2:.3f},"
        " {images_per_s:.0f} images/s"
    ).format(epoch, niter, **means)


def hint(augment):
    """Return what to do when `D_wins`; augment: the run's --augment."""
    first = "Try --augment translation first, in a new run; then" if augment == "none" else "Try"
    return (
        f"hint: for {HINT_STEPS} steps D(G(z)) was below 0.02 and the loss of G grew: D recognises all of G's images,"
        f" and G learns little. {first} more images, a smaller --ndf or a smaller --lr"
    )


def D_wins(rows):
    """Return whether, in the last HINT_STEPS steps of the log's rows, D(G(z)) was below 0.02 and the loss of G grew."""
    rows = [row for row in rows[-HINT_STEPS:] if row["step"] > rows[-1]["step"] - HINT_STEPS]
    middle = len(rows) // 2
    # A row covers the steps since the row before it; the first is taken to cover as many as the second.
    steps = rows[-1]["step"] - rows[0]["step"] + rows[1]["step"] - rows[0]["step"] if middle else 0
    if steps < 0.8 * HINT_STEPS or any(row["D_G_z1"] >= 0.02 for row in rows):
        return False
    return sum(row["loss_G"] for row in rows[-middle:]) > sum(row["loss_G"] for row in rows[:middle])


def describe_end(run, ended):
    """Print where the page of a dcgan.Run is and, if a signal stopped it, where it resumes. ended: see write_report."""
    page = run.folder.path / "report.html"
    if page.exists():  # it may have failed
        print(f"report: {page}")
    if ended.startswith("SIG"):
        position = f"epoch {run.epoch + 1}, step {run.epoch_step + 1}"
        print(f"{ended}: saved in {run.args.outf}; --resume continues at {position}", file=sys.stderr)


def warn_skipped(run):
    """Warn of images and folders left out since the last call, and list them in skipped.txt.

    With several processes, all must call it: where images are decoded at every use, each knows only those of its shard.
    """
    images = [report for reports in all_gather_object(run.images.skipped) for report in reports]
    for kind, reports in (("image", images), ("folder", run.images.unreadable_folders)) if run.rank == 0 else ():
        new = [report for report in dict.fromkeys(reports) if report not in run.warned_about]
        if new:
            names = ", ".join(new[:3]) + (f", ...; all are in {run.folder.skipped}" if len(new) > 3 else "")
            tqdm.write(f"warning: skipped {counted(len(new), kind)} that cannot be read: {names}", sys.stderr)
            run.warned_about.update(new)
            run.folder.add_skipped(new)
