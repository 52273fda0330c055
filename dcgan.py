"""Train a DCGAN (Radford et al. 2016, arXiv:1511.06434) on pictures.

python dcgan.py --imageSize 32 --niter 12 --outf out       # cartoon faces that the program draws itself
python dcgan.py --dataset folder --dataroot photos --cuda  # your own
torchrun --nproc-per-node 8 dcgan.py --dataset celeba --cuda  # on eight GPUs; so does --ngpu 8
"""

import argparse
import contextlib
import functools
import io
import math
import os
import platform
import random
import signal
import sys
import time

import torch
import torchvision
from tqdm import tqdm

from data import SOURCES, load_images
from models import Discriminator, Generator, check_image_size, load_discriminator, load_generator, pictures
from support.accelerator import default_precision, emulates_bfloat16, pick_device, tune, why_not_compile
from support.cli import Parser, number, show_any_name
from support.distributed import (
    everyones,
    firsts,
    is_lost_process,
    join,
    largest,
    launch,
    mean_over_processes,
    part_of,
    place,
)
from support.errors import DataError, ModelError, RunError
from support.fid import Judge
from support.latents import latents
from support.plots import grid_size, save_grid
from support.run_folder import MEASURES, RunFolder
from support.signals import StopOnSignal
from support.weights import weights_of
from training import Training

# What makes a run the run it is: a continued one keeps it.
FIXED = ("dataset", "classes", "image_size", "nc", "nz", "ngf", "ndf")
FIXED += ("batch_size", "lr", "beta1", "ema", "flip", "sync_bn", "manual_seed")
# What a continued run takes from its checkpoint unless it is given again.
KEPT = (*FIXED, "precision", "compile", "dataroot", "cache", "workers", "niter", "save_every", "log_every", "fid")
HINT_STEPS = 500  # so many steps D must win in a row for a hint
DIVERGED = "is not finite: the run has diverged; a smaller --lr helps. What was saved before is good"


def build_parser():
    parser = Parser(prog="dcgan.py", description=__doc__.splitlines()[0])
    count = number(int, 1)

    add = parser.add_argument_group("pictures").add_argument
    add("--dataset", default="cartoon", choices=SOURCES, help="which pictures to train on [%(default)s]")
    add("--dataroot", metavar="DIR", help="where they are, or are downloaded to [sets that can be downloaded: data]")
    add("--classes", default="bedroom", metavar="A,B", help="classes of lsun, separated by commas [%(default)s]")
    add("--imageSize", dest="image_size", type=count, default=64, metavar="N", help="side in pixels [%(default)s]")
    add("--nc", type=int, choices=(1, 3), help="channels: 1 grey, 3 colour [mnist: 1, others: 3]")
    add("--workers", type=number(int, 0), default=2, metavar="N", help="processes that decode pictures [%(default)s]")
    add("--cache", metavar="DIR", help="where prepared pictures are kept; none: nowhere [the user's cache folder]")

    add = parser.add_argument_group("networks").add_argument
    add("--nz", type=count, default=100, metavar="N", help="length of the latent z [%(default)s]")
    add("--ngf", type=count, default=64, metavar="N", help="channels of the generator's last hidden map [%(default)s]")
    add("--ndf", type=count, default=64, metavar="N", help="channels of the discriminator's first map [%(default)s]")
    add("--netG", metavar="FILE", help="start from these weights of a generator, with fresh optimizers")
    add("--netD", metavar="FILE", help="start from these weights of a discriminator, with fresh optimizers")

    add = parser.add_argument_group("training").add_argument
    add("--niter", type=count, default=25, metavar="N", help="epochs in all, with those before --resume [%(default)s]")
    add("--batchSize", dest="batch_size", type=count, default=128, metavar="N", help="pictures a step [%(default)s]")
    add("--lr", type=number(float, 0), default=0.0002, help="learning rate of both Adams [%(default)s]")
    add("--beta1", type=number(float, 0, 1), default=0.5, help="Adam's beta1; its beta2 is 0.999 [%(default)s]")
    add("--ema", type=number(float, 0, 1), default=0.99, help="decay of the averaged generator, 0: none [%(default)s]")
    add("--flip", action="store_true", help="mirror half of the pictures, at random, left to right")
    add("--manualSeed", dest="manual_seed", type=number(int, 0, 2**32), metavar="N", help="seed of a run [random]")

    add = parser.add_argument_group("device").add_argument
    add("--cuda", action="store_true", help="train on an NVIDIA or AMD GPU")
    add("--accel", action="store_true", help="train on the accelerator that torch finds: cuda, mps, xpu")
    add("--ngpu", type=count, default=1, metavar="N", help="GPUs to train on; without --cuda: processes [%(default)s]")
    add("--sync-bn", action="store_true", help="batch norm over the pictures of all processes, not over each one's")
    add(
        "--precision", choices=("fp32", "bf16"), help="of the networks' arithmetic [bf16 on a GPU that has it, or fp32]"
    )
    compiled = "compile the networks, which takes about a minute and makes steps faster [no]"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=compiled)

    add = parser.add_argument_group("run folder").add_argument
    add("--outf", default="out", metavar="DIR", help="folder of the run: pictures, weights, log [%(default)s]")
    add("--resume", action="store_true", help="continue the run in --outf exactly, or start it if there is none")
    add("--save-every", type=count, default=1, metavar="N", help="epochs from one save to the next [%(default)s]")
    add("--log-every", type=count, default=10, metavar="N", help="steps that a row of log.csv is about [%(default)s]")
    add(
        "--fid",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="at each save, Frechet distance of N samples to the pictures, 0: none [%(default)s]",
    )
    add("--dry-run", action="store_true", help="take one step, write all files, and stop")
    return parser


def parse_options(argv, processes):
    """Return (options, RunFolder, the checkpoint to continue from or None). Exits with 2 if they cannot work.

    processes: how many have joined; 1 if --ngpu is still to start them.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    run, checkpoint = RunFolder(args.outf), None
    try:
        run.check_free(args.resume)
        checkpoint = run.load_checkpoint() if args.resume else None
        if checkpoint:
            if args.dry_run and not run.is_dry_run():
                raise RunError(f"--dry-run would add a step to the run in {args.outf}; choose another --outf")
            saved = checkpoint["options"]
            parser.set_defaults(**saved)
            args = parser.parse_args(argv)
            now = vars(args)
            run.samples = saved.get("fid") or 0
            fixed = (*FIXED, "fid") if args.fid and run.samples else FIXED  # only distances of as many samples compare
            changed = [f"{k} {saved[k]}, not {now[k]}" for k in fixed if now[k] != saved.get(k, now[k])]
            if changed:
                raise RunError(f"--resume: the run in {args.outf} has {'; '.join(changed)}: leave that out")
            args.netG = args.netD = None  # the run goes on with its own
        check_image_size(args.image_size)
        args.nc = args.nc or (1 if args.dataset == "mnist" else 3)
        if args.manual_seed is None:
            args.manual_seed = random.SystemRandom().randrange(1, 10_000)
        check_processes(args, processes)
        if args.fid:
            Judge.check()
    except ModelError as error:
        parser.error(f"--imageSize: {error}")
    except RunError as error:
        parser.error(str(error))
    return args, run, checkpoint


class Meter:
    """The mean MEASURES of some steps, summed on the device and read at the end: one wait for it, not one a step."""

    def __init__(self):
        self.sum, self.steps, self.images, self.start = 0, 0, 0, time.perf_counter()

    def add(self, measures, images):
        self.sum, self.steps, self.images = self.sum + measures, self.steps + 1, self.images + images

    def read(self):
        """Return a dict of MEASURES and images_per_s. Raises RunError if one is not finite.

        Where several processes have joined, all must call it.
        """
        means = dict(zip(MEASURES, mean_over_processes(self.sum / self.steps).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            raise RunError(f"the loss {DIVERGED}")
        return means | {"images_per_s": self.images / (time.perf_counter() - self.start)}


def train(args, images, training, run, judge, epoch, step):
    """Train from batch `step` of `epoch` on, to the end or until told to stop; return the exit code."""
    steps_per_epoch = math.ceil(len(images) / args.batch_size)
    seen = epoch * len(images) + step * args.batch_size
    rank, processes = place()
    quiet = True if rank else None  # None: where there is no terminal
    bar = tqdm(total=args.niter * len(images), initial=seen, unit="img", disable=quiet, dynamic_ncols=True)
    told, stopped, hinted = 0, False, False
    with StopOnSignal(patient=processes > 1) as stop, bar:
        judged = functools.partial(measure, args, images, training, run, judge, lambda: stop.received)
        while epoch < args.niter and not stopped:
            bar.set_description(f"epoch {epoch + 1}/{args.niter}")
            meter = Meter()
            part = functools.partial(part_of, rank=rank, processes=processes)
            for batch in images.batches(args.batch_size, args.manual_seed, epoch, step, part):
                taken = len(batch) if processes == 1 else min(args.batch_size, len(images) - step * args.batch_size)
                if taken:  # else all its pictures were broken
                    meter.add(training.step(batch, taken), taken)
                step, seen = step + 1, seen + taken
                bar.update(taken)
                told = largest(stop.received)  # all stop at the same step
                stopped = bool(told) or args.dry_run
                if meter.steps and (stopped or step % args.log_every == 0 or step == steps_per_epoch):
                    means = meter.read()
                    if rank == 0:
                        log(bar, run, means, epoch, training.steps, seen)
                        hinted = hinted or hint_if_D_wins(run.rows[-HINT_STEPS:])
                    meter = Meter()
                if stopped:
                    break
            report(run, images)
            whole = step == steps_per_epoch or args.dry_run  # an epoch to show and to keep
            if step == steps_per_epoch:
                epoch, step = epoch + 1, 0
                if rank == 0:
                    tqdm.write(summary(run, epoch, args.niter))
                    sys.stdout.flush()  # a log file shows it at once
            if stopped or epoch % args.save_every == 0 or epoch == args.niter:
                save(args, images, training, run, epoch, step, whole, judged if judge else None)
                told = largest(stop.received)
                stopped = stopped or bool(told)
        if rank == 0:
            run.animate(args.image_size)
    if told and epoch < args.niter:
        name, where = signal.Signals(told).name, f"epoch {epoch + 1}, step {step + 1}"
        if rank == 0:
            print(f"{name}: saved in {run.path}; with --resume it goes on at {where}", file=sys.stderr)
        return 128 + told
    return 0


def log(bar, run, means, epoch, steps, seen):
    """Write what a meter read as a row of the log and behind the progress bar."""
    run.add_row({"epoch": epoch, "step": steps, "images": seen} | means)
    text = "D {loss_D:.2f} G {loss_G:.2f} D(x) {D_x:.2f} D(G(z)) {D_G_z1:.2f}/{D_G_z2:.2f}"
    bar.set_postfix_str(text.format(**means))


def hint_if_D_wins(rows):
    """Say what helps, and return True, if D has won the last HINT_STEPS steps of the log's rows, and G's loss grows."""
    rows = [row for row in rows if row["step"] > rows[-1]["step"] - HINT_STEPS]
    middle = len(rows) // 2
    steps = rows[-1]["step"] - rows[0]["step"] + rows[1]["step"] - rows[0]["step"] if middle else 0
    wins = steps >= 0.8 * HINT_STEPS and all(row["D_G_z1"] < 0.02 for row in rows)
    if not wins or sum(r["loss_G"] for r in rows[-middle:]) <= sum(r["loss_G"] for r in rows[:middle]):
        return False
    tqdm.write(
        f"hint: for {HINT_STEPS} steps D(G(z)) was below 0.02 and the loss of G grew: D tells all of G's pictures from"
        " real ones, and G learns little. More pictures help, a smaller --ndf, or a smaller --lr",
        sys.stderr,
    )
    return True


def summary(run, epoch, niter):
    """Return one line on the epoch just done: the means over its rows of the log."""
    rows = [row for row in run.rows if row["epoch"] == epoch - 1]
    means = {field: sum(row[field] for row in rows) / max(1, len(rows)) for field in (*MEASURES, "images_per_s")}
    return (
        "epoch {}/{}: loss_D {loss_D:.3f}, loss_G {loss_G:.3f}, D(x) {D_x:.3f}, D(G(z)) {D_G_z1:.3f} / {D_G_z2:.3f},"
        " {images_per_s:.0f} images/s"
    ).format(epoch, niter, **means)


def save(args, images, training, run, epoch, step, whole, judged):
    """Save what `epoch` epochs and `step` steps gave: a checkpoint, and of a `whole` epoch weights and pictures.

    judged: what is to be called after a whole epoch, or None.
    """
    together = 1 if args.sync_bn else place()[1]
    training.refresh_statistics(min(128, args.batch_size // together))  # as many as batch norm sees in training
    state = checkpoint_of(args, images, training, run, epoch, step)
    for name in ("netG", "netD"):
        if not all(t.isfinite().all() for t in state[name].values()):
            raise RunError(f"{name} {DIVERGED}")
    if place()[0] > 0:
        return
    if whole:
        done = epoch - 1 if step == 0 else epoch
        for name in ("netG", "netD", "netG_ema"):
            if name in state:
                run.save_weights(f"{name}_epoch_{done}", state[name])
        z = latents(range(grid_size(args.image_size)), args.nz)  # those of generate.py's first pictures
        save_grid(run.path / f"fake_samples_epoch_{done:03d}.png", pictures(training.shown_generator, z))
    run.save_checkpoint(state)
    run.plot_losses(math.ceil(len(images) / args.batch_size))
    if whole and judged:
        judged()  # which may take long, and will be done when the run goes on if it cannot be now


def measure(args, images, training, run, judge, stopped):
    """Measure the generator that the last row of the log is about, unless stopped(); keep it if it is the best."""
    distance = judge.distance(training.shown_generator, stopped)
    if distance is None:
        return
    lowest = run.add_distance(distance, weights_of(training.shown_generator))
    tqdm.write(f"Frechet distance {distance:.4g}" + (", the lowest so far: netG_best.pth" if lowest else ""))
    run.plot_losses(math.ceil(len(images) / args.batch_size))


def checkpoint_of(args, images, training, run, epoch, step):
    """Return the state of a run of which `epoch` epochs and `step` steps of the next are done."""
    options = {name: getattr(args, name) for name in KEPT} | {"fid": args.fid or run.samples}
    return training.state_dict() | {"epoch": epoch, "step": step, "pictures": len(images), "options": options}


def build_networks(args):
    """Return (G, D), initialised under the seed or read from --netG and --netD. Raises ModelError.

    Where several processes have joined, all have those of the first, and only it reads files.
    """
    torch.manual_seed(args.manual_seed)
    netG = Generator(args.nz, args.ngf, args.nc, args.image_size)
    netD = Discriminator(args.ndf, args.nc, args.image_size)
    if place()[0] == 0 and args.netG:
        netG = given(netG, load_generator(args.netG, average=False), "netG", ("nz", "ngf", "nc", "image_size"))
    if place()[0] == 0 and args.netD:
        netD = given(netD, load_discriminator(args.netD), "netD", ("ndf", "nc", "image_size"))
    if place()[0] == 0 and bool(args.netG) != bool(args.netD):
        fresh = "--netD" if args.netG else "--netG"
        print(f"warning: without {fresh}, that network starts afresh against a trained one", file=sys.stderr)
    for net in (netG, netD):
        net.load_state_dict(firsts(net.state_dict()))
    return netG, netD


def build_training(args, device, netG, netD, images):
    """Return the Training of this run over `images` pictures, with a warning if --compile is not possible."""
    rank, processes = place()
    reason = "not with --sync-bn" if args.sync_bn else why_not_compile(device) if args.compile else None
    if args.compile and reason and rank == 0:
        print(f"warning: --compile: not possible here, going on without ({reason})", file=sys.stderr)
    settings = {"lr": args.lr, "beta1": args.beta1, "ema": args.ema, "precision": args.precision, "flip": args.flip}
    settings |= {"seed": args.manual_seed, "sync_bn": args.sync_bn, "compiled": args.compile and not reason}
    return Training(netG, netD, device, **settings, batch_size=min(args.batch_size, images) // processes)


def given(wanted, net, name, sizes):
    """Return `net`. Raises ModelError if one of its `sizes` is not that of `wanted`."""
    for size in sizes:
        if getattr(net, size) != getattr(wanted, size):
            has, wants = getattr(net, size), getattr(wanted, size)
            raise ModelError(f"--{name}: {name} has {size} {has}, this run wants {wants}")
    return net


def describe(args, device, images, training):
    """Print the resolved settings, and warn of what may surprise."""
    for name, value in vars(args).items():
        print(f"  {name:12} {value}")
    parameters = {name: sum(p.numel() for p in getattr(training, name).parameters()) for name in ("netG", "netD")}
    print(f"{len(images):,} pictures; device {device}; parameters: G {parameters['netG']:,}, D {parameters['netD']:,}")
    if device.type == "cpu" and torch.accelerator.is_available():
        print(f"note: an accelerator is present ({torch.accelerator.current_accelerator()}); --accel would use it")
    elif args.accel and device.type == "cpu":
        print("warning: --accel: torch finds no accelerator; this run is on the CPU", file=sys.stderr)
    if training.processes > 1:
        captured = "" if device.type == "cpu" else ", whose steps are not captured as graphs"
        print(f"{training.processes} processes{captured}, {args.batch_size // training.processes} pictures each a step")
    if args.precision == "bf16" and emulates_bfloat16(device):
        print("note: --precision bf16: this CPU has no bfloat16 arithmetic; fp32 is faster here")
    if len(images) < args.batch_size:
        print(f"note: fewer pictures than --batchSize {args.batch_size}: every step takes all {len(images)}")


def check_processes(args, processes):
    """Raise RunError if the processes that --ngpu asks for, or that have joined, cannot train together."""
    wanted, here = max(args.ngpu, processes), max(args.ngpu, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.cuda and 1 < here > torch.cuda.device_count():
        raise RunError(f"--ngpu {here}: torch finds {torch.cuda.device_count()} CUDA devices here")
    if wanted > 1 and args.accel and not args.cuda and pick_device(False, True).type not in ("cpu", "cuda"):
        raise RunError(f"--ngpu {wanted}: several processes train on CUDA devices or on the CPU; leave --accel out")
    if args.batch_size % wanted:
        below = args.batch_size // wanted * wanted
        near = f"{below} and {below + wanted}" if below else wanted
        raise RunError(f"--batchSize {args.batch_size} does not divide among {wanted} processes (--ngpu); {near} would")


def report(run, images):
    """Warn of pictures and folders that were left out since the last report, and list them in skipped.txt.

    Where several processes have joined, all must call it: where pictures are decoded at every use, each knows its own.
    """
    everything = {"pictures": [each for reports in everyones(images.skipped) for each in reports]}
    everything["folders"] = images.unlisted
    for what, reports in everything.items() if place()[0] == 0 else ():
        new = [each for each in dict.fromkeys(reports) if each not in run.reported]
        if new:
            names = ", ".join(new[:3]) + (f", ...; all are in {run.skipped}" if len(new) > 3 else "")
            tqdm.write(f"warning: {len(new)} {what} that cannot be read were left out: {names}", sys.stderr)
            run.add_skipped(new)


def main(argv=None):
    show_any_name()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until training begins: tidy up and go
    rank, processes = join()
    asked = agree_on_options(argv, rank, processes)
    if isinstance(asked, int):
        return asked
    args, run, checkpoint = asked
    if processes == 1 and args.ngpu > 1:
        return launch(args.ngpu, __file__, sys.argv[1:] if argv is None else argv)
    device = None
    try:
        device = pick_device(args.cuda, args.accel, int(os.environ.get("LOCAL_RANK", 0)))
        args.precision = args.precision or default_precision(device)
        netG, netD = build_networks(args)
        images = prepare_images(args, rank)
        tune(device)  # after decoding, whose memory is better given back
        training = build_training(args, device, netG, netD, len(images))
        if device.type == "cuda":
            images.keep_on(device, torch.cuda.mem_get_info(device)[0])
        judge = Judge(images, args.fid, device) if args.fid and rank == 0 else None
        epoch, step = begin(args, images, training, run, checkpoint)
        if rank == 0:
            describe(args, device, images, training)
        report(run, images)
        last = run.rows[-1] if run.rows else {"step": None}
        if judge and step == 0 and last["step"] == training.steps and "fid" not in last:
            measure(args, images, training, run, judge, lambda: False)  # it was stopped before, or did not until now
        if rank == 0 and epoch >= args.niter:
            print(f"nothing to do: {run.path} has its {epoch} epochs; a larger --niter continues it")
        elif rank == 0 and checkpoint:
            print(f"continuing at epoch {epoch + 1}, step {step + 1}; --niter is {args.niter}")
    except (DataError, ModelError, RunError) as error:
        return refuse(error, 2)
    except OSError as error:
        return refuse(error, 1)
    except KeyboardInterrupt:
        return refuse("interrupted before training began", 130) if rank == 0 else 130
    except RuntimeError as error:
        return refuse_or_raise(error, args, device)
    try:
        return train(args, images, training, run, judge, epoch, step)
    except (DataError, RunError, OSError) as error:
        return refuse(error, 1)
    except RuntimeError as error:
        return refuse_or_raise(error, args, device)


def agree_on_options(argv, rank, processes):
    """Return (options, RunFolder, checkpoint) as the first process has them, or an exit code if it refused them."""
    asked = None
    if rank == 0:
        try:
            asked = parse_options(argv, processes)
        except SystemExit as refused:
            firsts(refused.code)
            raise
    asked = firsts(asked)  # a RunFolder that has not been opened is nothing but names
    return asked or 0


def prepare_images(args, rank):
    """Return the run's Images, prepared once on every machine by as many workers as its processes have together."""
    here, first = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0") == "0"
    workers = args.workers if args.cache == "none" else max(args.workers, min(args.workers * here, os.cpu_count() or 1))
    source = (args.dataset, args.dataroot, args.image_size, args.nc, args.classes)
    if not first:
        everyones(None)  # the first of this machine downloads and prepares
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
        images = load_images(*source, cache=args.cache, workers=workers)
    if first:
        everyones(None)
    counts = everyones(len(images))
    if len(set(counts)) > 1:
        raise RunError(f"--dataroot {args.dataroot}: the processes find different numbers of pictures: {counts}")
    return images


def begin(args, images, training, run, checkpoint):
    """Open the run folder, for a new run or to go on from `checkpoint`; return the epoch and step to begin at."""
    if checkpoint:
        if checkpoint["pictures"] != len(images):
            raise RunError(f"--resume: the run had {checkpoint['pictures']} pictures, now there are {len(images)}")
        try:
            training.load_state_dict(checkpoint)
            before = len(checkpoint["noise"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # whatever is not as it was saved
            raise RunError(f"--resume: the checkpoint in {run.path} is not one of these networks") from None
        if before != training.processes and training.rank == 0:
            print(f"note: {before} processes began what {training.processes} go on with: not bit for bit the same")
    first_state = None if checkpoint else checkpoint_of(args, images, training, run, 0, 0)
    if training.rank > 0:
        return (checkpoint["epoch"], checkpoint["step"]) if checkpoint else (0, 0)
    run.open(checkpoint)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    run.save_settings(vars(args) | {"versions": versions})
    if checkpoint:
        return checkpoint["epoch"], checkpoint["step"]
    first = next(images.batches(grid_size(args.image_size), args.manual_seed, epoch=0))
    save_grid(run.path / "real_samples.png", first)
    run.save_checkpoint(first_state)  # a run killed before its first save has its seed
    return 0, 0


def refuse(error, code):
    if place()[0] > 0:
        time.sleep(2)  # if the first process fails as well, its line is enough: the launcher then ends this one
    print(f"dcgan.py: {error}", file=sys.stderr)
    return code


def refuse_or_raise(error, args, device):
    """Refuse what the device's memory is too small for, or another process's end; raise every other RuntimeError."""
    if is_lost_process(error):
        return refuse("another process of this job has ended, and so does this one; what was saved is whole", 1)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # CUDA's, the CPU's
        return refuse(f"{device} has too little memory for --batchSize {args.batch_size}; a smaller one needs less", 1)
    raise error


if __name__ == "__main__":
    sys.exit(main())
