"""Check and measure this program on a machine with a CUDA GPU, in at most ten minutes.

python tests/gpu_check.py                  # all parts, each in a process of its own, with a time limit
python tests/gpu_check.py speed kernels    # some of them
python tests/gpu_check.py --device cpu     # what can run without a GPU, to try this script

It prints a line for each result and, at the end, one for each part: passed or failed, and the seconds that it took.
"""

import argparse
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models import Discriminator, Generator  # noqa: E402
from support import distributed  # noqa: E402
from support.accelerator import tune_device  # noqa: E402
from support.captured_step import WARM_UP  # noqa: E402
from support.distributed import all_reduces_with_nccl  # noqa: E402
from training import Trainer, TrainerSettings  # noqa: E402

SMALL = {"nz": 10, "ngf": 8, "image_size": 16}  # of G, for parts that do not measure


def trainer(device, batch_size=128, precision="bf16", small=False, **settings):
    torch.manual_seed(0)
    netG = Generator(**SMALL) if small else Generator()
    netD = Discriminator(ndf=8, image_size=16) if small else Discriminator()
    return Trainer(netG, netD, device, TrainerSettings(precision=precision, shard_size=batch_size, **settings))


def random_batch(run, size):
    side = run.netG.image_size
    return torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=run.device)


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def weights_of(run):
    return torch.cat([weight.detach().float().flatten().cpu() for weight in run.netG.parameters()])


# The parts


def tests(device):
    """The tests that only a CUDA device can run."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-m", ""], cwd=ROOT, check=True)


def speed(device):
    """Images per second of a step: captured, eager, and compiled (on CUDA, inside the capture)."""
    tune_device(device)
    sizes, repeats = ((128, 256, 512), 200) if device.type == "cuda" else ((8,), 2)
    for precision in ("bf16", "fp32"):
        for batch_size in sizes:
            for kind in ("captured", "eager", "compiled") if batch_size == sizes[0] else ("captured", "eager"):
                run = trainer(device, batch_size, precision, compile=kind == "compiled")
                if kind == "eager":
                    run.captured_step = None
                batch = random_batch(run, batch_size)
                for _ in range(WARM_UP + 2):
                    run.step(batch)
                wait_for(device)
                start = time.perf_counter()
                for _ in range(repeats):
                    run.step(batch)
                wait_for(device)
                rate = repeats * batch_size / (time.perf_counter() - start)
                is_graph = bool(run.captured_step and run.captured_step.graph)
                print(f"{precision} batch {batch_size} {kind}: {rate:,.0f} images/s, graph: {is_graph}", flush=True)


def kernels(device):
    """How many kernels a step launches, and which take longest."""
    run = trainer(device)
    run.captured_step = None
    batch = random_batch(run, 128 if device.type == "cuda" else 8)
    for _ in range(3):
        run.step(batch)
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        run.step(batch)
        wait_for(device)
    events = [
        event for event in profile.events() if event.device_type.name == ("CUDA" if device.type == "cuda" else "CPU")
    ]
    print(f"kernels in an eager step: {len(events)}")
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def addresses(device):
    """Parameters stay where a captured graph reads them, through a save and all that belongs to it."""
    run = trainer(device, small=True, batch_size=16)
    batch = random_batch(run, 16)
    for _ in range(WARM_UP + 2):
        run.step(batch)
    before = [weight.data_ptr() for net in run.networks().values() for weight in net.parameters()]
    run.prepare_sampling(16)
    state = run.state_dict()
    assert before == [weight.data_ptr() for net in run.networks().values() for weight in net.parameters()]
    after, twin = run.step(batch), trainer(device, small=True, batch_size=16)
    twin.load_state_dict(state)
    print(f"a step after the save: {after.tolist()}; the same from its checkpoint: {twin.step(batch).tolist()}")


def failing_capture(device):
    """A capture that fails leaves a run that goes on as one that was never captured."""
    run, plain = (trainer(device, small=True, batch_size=16) for _ in range(2))
    plain.captured_step, eager_step = None, run.eager_step

    def step_that_waits(batch):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # not allowed in a capture
        return eager_step(batch)

    run.eager_step = step_that_waits
    batch = random_batch(run, 16)
    for _ in range(WARM_UP + 4):
        run.step(batch), plain.step(batch)
    assert run.captured_step.graph is None
    assert torch.equal(run.rng.get_state(), plain.rng.get_state())
    print(f"largest difference of weights: {(weights_of(run) - weights_of(plain)).abs().max():.2g}")


def nccl(device):
    """Steps with an all-reduce of NCCL (one rank, halved as if there were two) are captured, and equal plain ones."""
    with one_free_port() as port:
        method = f"tcp://localhost:{port}"
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=method, rank=0, world_size=1)
    assert all_reduces_with_nccl()
    distributed.rank_and_world_size = lambda: (0, 2)  # for average_gradients: gradients are reduced, then halved
    run, plain = (trainer(device, small=True, batch_size=16) for _ in range(2))
    plain.captured_step = None
    for _ in range(WARM_UP + 20):
        batch = random_batch(run, 16)
        run.step(batch), plain.step(batch)
    assert run.captured_step.graph is not None
    torch.testing.assert_close(weights_of(run), weights_of(plain), rtol=1e-4, atol=1e-4)
    print(f"largest difference of weights: {(weights_of(run) - weights_of(plain)).abs().max():.2g}")
    dist.destroy_process_group()


def gloo(device):
    """Two ranks on one device over gloo end up with the same weights."""
    two_ranks("gloo", device)


def nccl_two_ranks(device):
    """Two ranks over NCCL, on two GPUs or on one (NCCL 2.30 or newer): captured steps equal those without a graph."""
    for sync_bn in (False, True):
        captured, plain = (two_ranks("nccl", device, sync_bn=sync_bn, eager=eager) for eager in (False, True))
        assert captured == plain, (captured, plain)


def two_ranks(backend, device, **options):
    """Train in two processes; check that their weights are equal; return the sum of the weights."""
    with one_free_port() as port:
        job = {"WORLD_SIZE": "2", "PORT": str(port), "BACKEND": backend, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    job |= {name.upper(): "1" for name, value in options.items() if value}
    command = [sys.executable, __file__, "--device", device.type, "--rank-of-two"]
    processes = [
        subprocess.Popen(command, env=os.environ | job | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    print(f"{backend} {options or ''} on both ranks: {outputs[0].strip()}", flush=True)
    return outputs[0].split()[-1]


def rank_of_two(device):
    """Be one of the processes that `two_ranks` starts: train, and print the sum of the weights."""
    rank, on_nccl = int(os.environ["RANK"]), os.environ["BACKEND"] == "nccl"
    if on_nccl and torch.cuda.device_count() > 1:
        device = torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    backend = "cpu:gloo,cuda:nccl" if on_nccl else "gloo"
    method = f"tcp://localhost:{os.environ['PORT']}"
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=2)
    run = trainer(device, small=True, batch_size=8, sync_bn="SYNC_BN" in os.environ)
    if "EAGER" in os.environ:
        run.captured_step = None
    torch.manual_seed(rank)
    for _ in range(WARM_UP + 20):
        run.step(random_batch(run, 8))
    is_graph = bool(run.captured_step and run.captured_step.graph)
    assert is_graph == (on_nccl and "EAGER" not in os.environ)
    print(f"graph: {is_graph}, sum of the weights: {weights_of(run).double().sum().item()}")
    run.close()
    dist.destroy_process_group()


def whole_run(device):
    """Cartoons: trained, stopped by a signal, resumed, and sampled twice with equal files."""
    options = ["--cuda"] if device.type == "cuda" else ["--imageSize", "16", "--ngf", "8", "--ndf", "8", "--nz", "10"]
    where = options[:1] if device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder:
        program = functools.partial(subprocess.run, cwd=folder, check=True)
        train = [sys.executable, str(ROOT / "dcgan.py"), "--outf", "out", "--cache", "cache", "--resume"]
        start = time.perf_counter()
        process = subprocess.Popen([*train, *options, "--niter", "3"], cwd=folder, text=True)
        while not list(Path(folder).glob("out/netG_epoch_0.pth")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        print(f"stopped with {process.wait()}, after {time.perf_counter() - start:.1f} s", flush=True)
        program([*train, *where, "--niter", "3"])
        for name in ("first", "second"):
            program([sys.executable, str(ROOT / "generate.py"), *where, "--outf", name, "--num_output", "100"])
        files = [
            {path.name: path.read_bytes() for path in Path(folder, name).iterdir()} for name in ("first", "second")
        ]
        assert files[0] == files[1]
        print(f"{len(files[0])} sampled files are equal in two processes")
        print(Path(folder, "out", "log.csv").read_text().splitlines()[-1])


@contextlib.contextmanager
def one_free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    yield port


PARTS = {  # seconds that each may take, and whether it runs without CUDA
    tests: (120, False),
    speed: (150, True),
    kernels: (40, True),
    addresses: (30, True),
    failing_capture: (30, False),
    nccl: (40, False),
    gloo: (60, True),
    nccl_two_ranks: (120, False),
    whole_run: (120, True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="part", default=names, help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-of-two", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    chosen = [part for part in PARTS if part.__name__ in args.parts and (args.device == "cuda" or PARTS[part][1])]
    if args.rank_of_two or args.alone:
        for work in [rank_of_two] if args.rank_of_two else chosen:
            work(device)
        return 0
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    results = [run_alone(part, args.device) for part in chosen]
    print("\n".join(results))
    return int(any("failed" in result for result in results))


def run_alone(part, device):
    """Run a part in a process of its own; return the line that says how it went."""
    print(f"\n== {part.__name__}: {part.__doc__}", flush=True)
    command = [sys.executable, __file__, "--device", device, "--alone", part.__name__]
    start = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=PARTS[part][0]).returncode
        outcome = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        outcome = "failed: it took too long"
    return f"{part.__name__:16} {outcome}, {time.perf_counter() - start:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
