"""Train a DCGAN (Radford et al. 2016, arXiv:1511.06434) on images.

python dcgan.py --imageSize 32 --niter 12 --outf out            # cartoon faces, which the program draws itself
python dcgan.py --dataroot photos --cuda --outf out-photos      # your own images
torchrun --nproc-per-node 8 dcgan.py --dataset celeba --cuda    # eight GPUs; or --ngpu 8
"""

from support.signals import interrupt_quietly

if __name__ == "__main__":
    interrupt_quietly(True)  # while the imports below take their seconds

import argparse
import io
import os
import signal
import sys
import time
from contextlib import closing, nullcontext, redirect_stdout
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import OLD_READING, SOURCES, PreparedImages, ReadSettings, absolute_folders, check_same_images, load_images
from models import Discriminator, Generator, generate_images, latents, load_discriminator, load_generator
from support import accelerator, distributed, progress
from support.cli import protect_output
from support.contrast import contrast_of_data_set
from support.errors import UserError, counted
from support.fid import FidMeter
from support.log import Log
from support.options import SAVED_OPTIONS, build_parser, parse_options
from support.pixel_range import warn_if_narrow
from support.plots import animate, images_per_grid, save_grid
from support.report import write_report
from support.run_folder import RunFolder
from support.signals import StopSignal
from support.versions import library_versions
from support.weights import check_sizes
from training import StepAverages, StepResult, Trainer, TrainerSettings


@dataclass
class Run:
    """All that a run works with, and its progress."""

    args: argparse.Namespace
    images: PreparedImages
    trainer: Trainer
    folder: RunFolder
    log: Log
    fid_meter: FidMeter | None  # of rank 0, with --fid
    epoch: int = 0  # epochs finished
    epoch_step: int = 0  # steps finished in the current epoch (trainer.steps_taken: in all epochs)
    fid_samples: int = 0  # --fid of the checkpoint from which the run resumed, kept if it is 0 now
    hint_printed: bool = False

    def __post_init__(self):
        self.rank, self.world_size = distributed.rank_and_world_size()
        self.steps_per_epoch, self.images_per_epoch = self.images.epoch_size(self.args.batch_size, self.world_size)
        self.warned_about = set()  # skipped images and folders of which a warning was printed

    def images_seen(self):
        return self.epoch * self.images_per_epoch + min(self.epoch_step * self.args.batch_size, self.images_per_epoch)


def main(argv=None):
    """Train as the command line `argv` asks. Returns the exit code: 0 done, 1 failed, 2 refused, 128 + a signal.

    Raises SystemExit for a bad option.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until training starts; see StopSignal
    parser = build_parser("Train a DCGAN (Radford et al. 2016, arXiv:1511.06434) on images.", SOURCES)
    args, in_training = None, False
    try:
        rank, world_size = distributed.init_distributed()
        args, checkpoint = distributed.broadcast_object(parse_options(parser, argv, world_size) if rank == 0 else None)
        if world_size == 1 and args.ngpu > 1:
            return distributed.launch_processes(args.ngpu, __file__, sys.argv[1:] if argv is None else argv)
        run = set_up(args, checkpoint)
        in_training = True
        return train(run)
    except UserError as error:
        return fail(error, 1 if in_training else 2)
    except OSError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted before training started", 130)
    except (RuntimeError, MemoryError) as error:
        if distributed.is_lost_process(error):
            return fail("another process of this job has ended, so this one ends; saved files are intact", 1)
        if args and accelerator.is_out_of_memory(error):
            return fail(f"out of memory with --batchSize {args.batch_size}; try a smaller one, in another --outf", 1)
        raise


def fail(error, code):
    """Print why the program ends, in one line; return its exit code."""
    if distributed.rank_and_world_size()[0] > 0:
        time.sleep(2)  # if rank 0 fails as well, its line is enough: the launcher then ends this process
    print(f"dcgan.py: {error}", file=sys.stderr)
    return code


def set_up(args, checkpoint):
    """Return the Run for these options, new or resumed from a checkpoint, with its folder open.

    Raises UserError for a request that cannot work, and OSError.
    """
    # Device
    device = accelerator.pick_device(args.cuda, args.accel, int(os.environ.get("LOCAL_RANK", 0)))
    args.precision = args.precision or accelerator.default_precision(device)

    # Networks and images
    netG, netD = build_networks(args)
    images = prepare_images(args, checkpoint)
    accelerator.tune_device(device)  # after decoding: from now on, freed memory is kept

    # Training state
    if checkpoint:
        check_same_images(images, checkpoint, args.outf)
    trainer = Trainer(netG, netD, device, trainer_settings(args, device, images, checkpoint))
    if checkpoint:
        restore(trainer, checkpoint, args)
    if device.type != "cpu":
        images.cache_on(device, accelerator.free_memory(device))
    rank = distributed.rank_and_world_size()[0]
    fid_meter = FidMeter(images, args.fid, device, generate_images) if args.fid and rank == 0 else None

    # Run folder
    folder = RunFolder(args.outf, args.keep)
    run = Run(args, images, trainer, folder, Log(folder.path / "log.csv", StepResult._fields), fid_meter)
    if checkpoint:
        run.epoch, run.epoch_step = checkpoint["epoch"], checkpoint["step"]
        run.fid_samples = checkpoint["options"].get("fid", 0)
    open_folder(run, checkpoint)
    if rank == 0:
        progress.describe(run, resumed=checkpoint is not None)
    progress.warn_skipped(run)
    return run


def build_networks(args):
    """Return (netG, netD), initialised under the seed or read from --netG and --netD, equal in all processes.

    Raises UserError if a file does not fit the options.
    """
    torch.manual_seed(args.manual_seed)
    netG = Generator(args.nz, args.ngf, args.nc, args.image_size)
    netD = Discriminator(args.ndf, args.nc, args.image_size)
    if distributed.rank_and_world_size()[0] == 0:
        if args.netG:
            netG = load_generator(args.netG, average=False)
            check_sizes(netG, args, "netG")
        if args.netD:
            netD = load_discriminator(args.netD)
            check_sizes(netD, args, "netD")
        if bool(args.netG) != bool(args.netD):
            new = "--netD" if args.netG else "--netG"
            print(f"warning: {new} is not given: that network starts untrained against a trained one", file=sys.stderr)
    for net in (netG, netD):
        net.load_state_dict(distributed.broadcast_object(net.state_dict()))
    return netG, netD


def prepare_images(args, checkpoint):
    """Return the PreparedImages of the data set, prepared once on each machine. Raises UserError and OSError.

    A resumed run reads the data set as before, as its checkpoint says.
    """
    rank, world_size = distributed.rank_and_world_size()
    workers = args.workers
    if args.cache != "none":  # while one process of a machine prepares the array, it can use the workers of all
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(workers, min(workers * local_size, os.cpu_count() or 1))
    reading = checkpoint.get("reading", OLD_READING) if checkpoint else {"crop": args.crop}
    expected_files = (checkpoint or {}).get("data", {}).get("files")  # others are not prepared, but refused
    settings = ReadSettings(nc=args.nc, classes=args.classes, expected_files=expected_files, **reading)
    with distributed.local_main_process_first(), redirect_stdout(io.StringIO()) if rank else nullcontext():
        images = load_images(args.dataset, args.dataroot, args.image_size, args.cache, workers, settings)
    found = distributed.all_gather_object((len(images), images.fingerprints["files"]))
    if len(set(found)) > 1:
        counts = ", ".join(str(count) for count, _ in found)
        raise UserError(f"--dataroot: the processes find different images: {counts}; names and sizes must be equal too")
    if len(images) < world_size:
        raise UserError(f"--ngpu: {world_size} processes are too many for {counted(len(images), 'image')}")
    return images


def trainer_settings(args, device, images, checkpoint):
    """Return the TrainerSettings of these options, with a warning if --compile is not possible."""
    rank, world_size = distributed.rank_and_world_size()
    reason = "not with --sync-bn" if args.sync_bn else accelerator.why_not_compile(device) if args.compile else None
    if args.compile and reason and rank == 0:
        print(f"warning: --compile is not possible here; continuing without it ({reason})", file=sys.stderr)
    options = {name: getattr(args, name) for name in ("lr", "beta1", "ema", "precision", "flip", "augment", "sync_bn")}
    options |= {"seed": args.manual_seed, "compile": args.compile and not reason}
    contrast = (checkpoint or {}).get("target_contrast", 0) if args.contrast else 0
    if args.contrast and not contrast:  # a new run, or one that had no --contrast before
        contrast = distributed.broadcast_object(contrast_of_data_set(images) if rank == 0 else None)
    options |= {"target_contrast": contrast, "shard_size": min(args.batch_size, len(images)) // world_size}
    return TrainerSettings(**options)


def restore(trainer, checkpoint, args):
    """Load a checkpoint into the trainer. Raises UserError if it does not fit."""
    try:
        trainer.load_state_dict(checkpoint)
        before = len(checkpoint["noise"])  # one random state for each process
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # anything that is not as it was saved
        raise UserError(f"--resume: the checkpoint in {args.outf} does not fit these networks") from None
    if before != trainer.world_size and trainer.rank == 0:
        change = f"from {before} to {trainer.world_size}"
        print(f"note: the number of processes has changed {change}: results will not be bit-identical")


def open_folder(run, checkpoint):
    """Open the run folder and log of rank 0, with args.json, report.html and, of a new run, a checkpoint and a grid."""
    args = run.args
    initial = None if checkpoint else checkpoint_of(run)  # all processes call it
    if run.rank > 0:
        return
    run.folder.open(checkpoint)
    run.log.open(checkpoint["steps"] if checkpoint else None)
    if run.epoch < args.niter or args.fid:  # otherwise there is nothing to do
        run.folder.save_settings(vars(args) | absolute_folders(args) | {"versions": library_versions()})
    if initial:
        run.folder.save_checkpoint(initial)  # a run killed before its next checkpoint keeps its seed
    if initial or run.images.path:  # a resumed run with --cache none would have to decode some
        batch = next(run.images.batches(images_per_grid(args.image_size), args.manual_seed, epoch=0))
        warn_if_narrow(batch.cpu(), run.images.path)
    if initial:
        run.folder.draw_or_warn(save_grid, "real_samples.png", batch)
    if run.epoch < args.niter:
        update_report(run)


def train(run):
    """Train to the last epoch, or until a signal; return the exit code. Raises UserError and OSError."""
    args, ended = run.args, "an error"
    total, hidden = args.niter * run.images_per_epoch, True if run.rank else None  # None: only without a terminal
    options = {"unit": "img", "dynamic_ncols": True, "bar_format": progress.BAR_FORMAT}
    bar = tqdm(total=total, initial=run.images_seen(), disable=hidden, **options)
    try:
        with StopSignal(ignore_repeats=run.world_size > 1) as stop, bar, closing(run.log), closing(run.folder):
            signum = train_epochs(run, bar, stop)
            if run.rank == 0:
                run.folder.wait()
                run.folder.draw_or_warn(animate, "progress.gif", args.image_size)
            stopped_by = signal.Signals(signum).name if signum else "dry run"
            ended = "finished" if run.epoch >= args.niter else stopped_by
    finally:
        # Not of a run beyond --niter, which has done nothing. The thread that writes files has ended by now.
        if run.rank == 0 and (run.images_seen() <= total or args.fid):
            update_report(run, ended)
    run.trainer.close()  # not after an error: it waits for the device, which may wait for a lost process
    if run.rank == 0:
        progress.describe_end(run, ended)
    return 128 + signum if signum and run.epoch < args.niter else 0


def train_epochs(run, bar, stop):
    """Take the remaining epochs; stop after a signal. Returns the number of the signal, or 0."""
    args, signum = run.args, 0
    last_row = run.log.rows[-1] if run.log.rows else {"step": None}
    if run.fid_meter and run.epoch_step == 0 and last_row["step"] == run.trainer.steps_taken and "fid" not in last_row:
        measure_fid(run, lambda: stop.received)  # the run was stopped before its last FID, or had no --fid
    while run.epoch < args.niter:
        # Train
        bar.set_description_str(f"epoch {run.epoch + 1}/{args.niter}")
        train_epoch(run, bar, stop)
        progress.warn_skipped(run)

        # Report
        finished_epoch = run.epoch_step >= run.steps_per_epoch
        if finished_epoch:
            run.epoch, run.epoch_step = run.epoch + 1, 0
            if run.rank == 0:
                tqdm.write(progress.epoch_summary(run.log.rows, run.epoch, args.niter))
                sys.stdout.flush()  # for a log file to show it at once

        # Save and measure
        signum = distributed.all_reduce_max(stop.received)
        last = bool(signum) or args.dry_run or run.epoch == args.niter
        if last or run.epoch % args.save_every == 0:
            save(run, finished_epoch or args.dry_run, last)
            if run.fid_meter and (finished_epoch or args.dry_run):
                measure_fid(run, lambda: stop.received)
            signum = distributed.all_reduce_max(stop.received)  # it may have come while saving
        if signum or args.dry_run:
            break
    return signum


def train_epoch(run, bar, stop):
    """Take the remaining steps of an epoch; stop after a signal, or after one step of a dry run."""
    args, averages, process = run.args, StepAverages(), (run.rank, run.world_size)
    for batch in run.images.batches(args.batch_size, args.manual_seed, run.epoch, run.epoch_step, *process):
        count = len(batch) * run.world_size
        averages.add(run.trainer.step(batch), count)
        run.epoch_step += 1
        bar.update(count)
        stopped = distributed.all_reduce_max(stop.received) or args.dry_run  # all processes stop at the same step
        if stopped or run.epoch_step % args.log_every == 0 or run.epoch_step == run.steps_per_epoch:
            means = averages.compute()
            averages = StepAverages()
            if run.rank == 0:
                add_log_row(run, means, bar)
        if stopped:
            return


def add_log_row(run, means, bar):
    """Add the mean StepResult of some steps to the log, and show it to the right of the progress bar."""
    run.log.add_row({"epoch": run.epoch, "step": run.trainer.steps_taken, "images": run.images_seen()} | means)
    bar.set_postfix_str(progress.bar_text(means))
    if not run.hint_printed and progress.D_wins(run.log.rows):
        run.hint_printed = True
        tqdm.write(progress.hint(run.args.augment), sys.stderr)


def save(run, with_weights, last):
    """Save a checkpoint and, `with_weights`, also weights files and samples, without waiting for the disk.

    Raises UserError, before anything is written, if a weight is not finite. Also raises any error of the save before.
    """
    args, trainer = run.args, run.trainer
    processes = 1 if args.sync_bn else run.world_size
    contrast = trainer.prepare_sampling(min(128, args.batch_size // processes))  # as in training, but at most 128
    trainer.check_finite()
    state = checkpoint_of(run)
    if run.rank > 0:
        return
    if contrast:
        run.log.add_measurement("contrast", contrast / trainer.settings.target_contrast)
    weights = samples = None
    if with_weights:
        netG = trainer.sampling_generator()
        weights = {name: state[name] for name in trainer.networks()}
        weights[trainer.sampled_name] = accelerator.copy_to_cpu(dict(netG.state_dict()))
        z = latents(range(images_per_grid(args.image_size)), args.nz)  # those of generate.py's first images
        samples = generate_images(netG, z)
    rows = [dict(row) for row in run.log.rows]
    run.folder.in_background(run.folder.save, state, weights, samples, rows, run.steps_per_epoch, last)


def checkpoint_of(run):
    """Return a checkpoint of the run. With several processes, all must call it."""
    options = {name: getattr(run.args, name) for name in SAVED_OPTIONS} | absolute_folders(run.args)
    options["fid"] = run.args.fid or run.fid_samples
    # "step": steps finished in the current epoch; the trainer's "steps": in all epochs, as "step" in log.csv.
    position = {"epoch": run.epoch, "step": run.epoch_step}
    # "pictures": how many images there are; "data": hashes of their files; "reading": how they are read.
    images = {"pictures": len(run.images), "data": run.images.fingerprints, "reading": run.images.reading}
    return run.trainer.state_dict() | position | images | {"options": options}


def measure_fid(run, should_stop):
    """Measure the FID of the generator for the log's last row, unless should_stop(); keep the weights of the best."""
    netG = run.trainer.sampling_generator()
    distance = run.fid_meter.distance(netG, should_stop)
    if distance is None:
        return
    lowest = run.log.is_lowest(distance)
    if lowest:
        run.folder.save_weights("netG_best", accelerator.copy_to_cpu(dict(netG.state_dict())))
    run.log.add_measurement("fid", distance)
    tqdm.write(f"FID {distance:.4g}" + (", the lowest so far: netG_best.pth" if lowest else ""))
    rows = [dict(row) for row in run.log.rows]
    run.folder.in_background(run.folder.draw, rows, run.epoch, run.epoch_step, run.steps_per_epoch)


def update_report(run, ended=None):
    """Write report.html, the page of the run. ended: None while the run trains, or what has ended it."""
    arguments = (run.log.rows, run.epoch, run.epoch_step, run.steps_per_epoch, ended)
    run.folder.draw_or_warn(write_report, "report.html", *arguments)


if __name__ == "__main__":
    interrupt_quietly(False)
    protect_output()
    distributed.run_and_exit(main)
