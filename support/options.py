"""The command line of dcgan.py: its options, and whether they can work together."""

import argparse
import os
import random
from os.path import expanduser  # for ~, which shells leave as it is in --outf=~/x

import torch

from support.augmentation import ordered_names
from support.cli import Parser, check_options_have_effect, number, option_name
from support.errors import UserError, counted
from support.fid import check_installed
from support.image_sizes import check_image_size
from support.run_folder import RunFolder

# Options that a resumed run takes from its checkpoint. FIXED_OPTIONS keep their values; others can get new ones.
FIXED_OPTIONS = ("dataset", "classes", "image_size", "nc", "crop", "nz", "ngf", "ndf")
FIXED_OPTIONS += ("batch_size", "lr", "beta1", "ema", "flip", "augment", "sync_bn", "manual_seed")
SAVED_OPTIONS = (*FIXED_OPTIONS, "contrast", "precision", "compile", "dataroot", "cache", "workers")
SAVED_OPTIONS += ("niter", "save_every", "keep", "log_every", "fid")
OLD_VALUES = {"augment": "none", "crop": 0}  # for checkpoints saved before these options existed
GREY = ("fashion-mnist", "kmnist", "mnist")  # data sets of grey images


def build_parser(description, datasets):
    """Return the parser of dcgan.py's command line; datasets: the names that --dataset takes."""
    parser = Parser(prog="dcgan.py", description=description)
    count, default = number(int, 1), "(default: %(default)s)"

    add = parser.add_argument_group("images").add_argument
    text = f"data set: {', '.join(datasets)} (default: cartoon; with --dataroot: folder)"
    add("--dataset", default="cartoon", choices=datasets, metavar="NAME", help=text)
    text = "folder of the data set (default: data); for folder, imagenet and lfw: a folder of images, a .zip, .tar"
    text += " or .tar.gz archive of one, or a .npy or .npz array (no default)"
    add("--dataroot", type=expanduser, metavar="PATH", help=text)
    add("--classes", default="bedroom", metavar="A,B", help=f"classes of lsun, separated by commas {default}")
    add("--imageSize", dest="image_size", type=count, default=64, metavar="N", help=f"height and width {default}")
    text = "use only the centre of each image, N x N, before resizing (CelebA: often 108 or 140; default: 0, off)"
    add("--crop", type=number(int, 0), default=0, metavar="N", help=text)
    text = f"channels: 1 grey, 3 RGB (default for {', '.join(GREY)}: 1, otherwise: 3)"
    add("--nc", type=int, choices=(1, 3), help=text)
    add("--workers", type=number(int, 0), default=2, metavar="N", help=f"processes that decode images {default}")
    text = 'folder for prepared images; "none" decodes them every time (default: user cache)'
    add("--cache", type=expanduser, metavar="DIR", help=text)

    add = parser.add_argument_group("networks").add_argument
    add("--nz", type=count, default=100, metavar="N", help=f"length of the latent vector {default}")
    add("--ngf", type=count, default=64, metavar="N", help=f"channels of G's last hidden layer {default}")
    add("--ndf", type=count, default=64, metavar="N", help=f"channels of D's first layer {default}")
    text = "weights, checkpoint or run folder whose {} to start from, with new optimizers"
    add("--netG", type=expanduser, metavar="PATH", help=text.format("G"))
    add("--netD", type=expanduser, metavar="PATH", help=text.format("D"))

    add_training_options(parser)
    return parser


def add_training_options(parser):
    """Add the options of training, of the device and of the run folder."""
    count, default = number(int, 1), "(default: %(default)s)"

    add = parser.add_argument_group("training").add_argument
    add("--niter", type=count, default=25, metavar="N", help=f"total number of epochs {default}")
    add("--batchSize", dest="batch_size", type=count, default=128, metavar="N", help=f"total batch size {default}")
    add("--lr", type=number(float, 0), default=0.0002, help=f"learning rate {default}")
    add("--beta1", type=number(float, 0, 1), default=0.5, help=f"Adam's beta1; its beta2 is 0.999 {default}")
    add("--ema", type=number(float, 0, 1), default=0.99, help=f"decay of G's moving average (EMA); off: 0 {default}")
    add("--flip", action="store_true", help="mirror each image, left to right, with probability 0.5")
    augment = f"augment what D sees, for few images: color, translation, cutout, or several as A,B {default}"
    add("--augment", type=ordered_names, default="none", metavar="A,B", help=augment)
    text = "give samples the contrast of the training images, because G tends to lose it (default: yes)"
    add("--contrast", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--manualSeed", dest="manual_seed", type=number(int, 0, 2**32), metavar="N", help="seed (default: random)")

    add = parser.add_argument_group("device").add_argument
    add("--cuda", action="store_true", help="train on an NVIDIA or AMD GPU")
    add("--accel", action="store_true", help="train on the accelerator that torch finds: cuda, mps, xpu")
    add("--ngpu", type=count, default=1, metavar="N", help=f"number of processes; on CUDA, each uses one GPU {default}")
    add("--sync-bn", action="store_true", help="batch norm over the whole batch instead of each process's shard")
    text = "precision (default: bf16 on a CUDA GPU that has it, otherwise fp32, which uses TF32 on NVIDIA GPUs)"
    add("--precision", choices=("fp32", "bf16"), help=text)
    text = "compile the networks: half a minute, then faster on a GPU, not on a CPU (default: no)"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=text)

    add = parser.add_argument_group("run folder").add_argument
    text = f"folder for weights, checkpoints, images, log {default}"
    add("--outf", type=expanduser, default="out", metavar="DIR", help=text)
    add("--resume", action="store_true", help="resume the run in --outf exactly, or start it if there is none")
    add("--save-every", type=count, default=1, metavar="N", help=f"save a checkpoint every N epochs {default}")
    text = "keep only the weights of the newest N checkpoints; remove the run's older ones (default: 0, all)"
    add("--keep", type=number(int, 0), default=0, metavar="N", help=text)
    add("--log-every", type=count, default=10, metavar="N", help=f"write a row of log.csv every N steps {default}")
    text = "measure FID with N samples at each checkpoint; needs torchmetrics[image] (default: 0, off)"
    add("--fid", type=number(int, 0), default=0, metavar="N", help=text)
    add("--dry-run", action="store_true", help="take one step, write all files, and stop")


def parse_options(parser, argv, world_size):
    """Return (options, the checkpoint to resume from or None). Exits with 2 if the options cannot work.

    world_size: the number of processes that have joined; 1 if --ngpu is still to start them.
    """
    args = parser.parse_args(argv)
    folder, checkpoint = RunFolder(args.outf), None
    try:
        folder.check_can_start(args.resume)
        checkpoint = folder.load_checkpoint() if args.resume else None
        if checkpoint:
            if args.dry_run and not folder.is_dry_run():
                raise UserError(f"--dry-run would add a step to the run in {args.outf}; choose another --outf")
            saved = OLD_VALUES | checkpoint["options"]
            parser.set_defaults(**{name: saved[name] for name in SAVED_OPTIONS if name in saved})
            args = parser.parse_args(argv)
            check_unchanged(args, saved)
            drawn = args.dataset == "cartoon" and not saved.get("dataroot")  # earlier versions accepted one
            if drawn and "dataroot" in parser.typed_options(argv):
                why = f"the run in {args.outf} draws its images; start a new run for others"
                raise UserError(f"--dataroot has no effect here: {why}")
            args.netG = args.netD = None  # a resumed run has its own
        else:
            typed = parser.typed_options(argv)
            if "dataroot" in typed and "dataset" not in typed:
                args.dataset = "folder"
            check_options_have_effect(typed, options_without_effect(args, world_size))
        check_image_size(args.image_size)
        args.nc = args.nc or (1 if args.dataset in GREY else 3)
        if args.manual_seed is None:
            args.manual_seed = random.SystemRandom().randrange(1, 10_000)
        if args.dataroot and os.path.realpath(args.dataroot) == os.path.realpath(args.outf):
            raise UserError(f"--outf {args.outf} is --dataroot, the folder of the images; choose another --outf")
        check_processes(args, world_size)
        if args.fid:
            check_installed()
    except UserError as error:
        parser.error(str(error))
    return args, checkpoint


def options_without_effect(args, world_size):
    """Return a table for check_options_have_effect of the options that can have no effect on a new run.

    It accepts command lines of the public example: --dataset fake --dataroot x, --classes bedroom.
    """
    local, started = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), f"torchrun has started {world_size} processes"
    return (  # option, where it has no effect, why and what may have been meant
        ("dataroot", args.dataset == "cartoon", "cartoon images are drawn; a folder of images is --dataset folder"),
        ("crop", args.dataset in ("cartoon", "fake"), f"{args.dataset} images are made in the size of --imageSize"),
        ("classes", args.dataset != "lsun" and args.classes != "bedroom", "only --dataset lsun has classes"),
        ("sync_bn", max(args.ngpu, world_size) == 1, "one process has the whole batch; --ngpu N starts N processes"),
        ("ngpu", world_size > 1 and args.ngpu not in (1, local, world_size), started),
    )


def check_unchanged(args, saved):
    """Raise UserError if `args` change options that a resumed run must keep as they were `saved`."""
    now = {name: getattr(args, name) for name in FIXED_OPTIONS}
    before = {name: saved.get(name, now[name]) for name in FIXED_OPTIONS}
    measured = saved.get("fid")
    if args.fid and measured:  # only FIDs with equal sample counts can be compared
        now["fid"], before["fid"] = args.fid, measured
    changed = [f"{option_name(name)} {before[name]}, not {now[name]}" for name in now if now[name] != before[name]]
    if changed:
        raise UserError(f"--resume: the run in {args.outf} has {'; '.join(changed)}; leave out what differs")


def check_processes(args, world_size):
    """Raise UserError if the processes that --ngpu asks for, or that have joined, cannot train together."""
    wanted, here = max(args.ngpu, world_size), max(args.ngpu, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    found = args.accel and wanted > 1 and torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if args.cuda else found.type if found else "cpu"
    if kind == "cuda" and 1 < here > torch.cuda.device_count():
        raise UserError(f"--ngpu {here}: torch finds {counted(torch.cuda.device_count(), 'CUDA device')} here")
    if wanted > 1 and kind not in ("cpu", "cuda"):
        raise UserError(f"--ngpu {wanted}: several processes train on CUDA devices or on the CPU; leave --accel out")
    if args.batch_size % wanted:
        below = args.batch_size // wanted * wanted
        near = f"{below} or {below + wanted}" if below else wanted
        raise UserError(
            f"--batchSize {args.batch_size} cannot be shared evenly by {wanted} processes (--ngpu); use {near}"
        )
