"""Take steps as one of several processes, and save what they gave: first all three together, then the first two.

python distributed_steps.py FOLDER RANK PORT-OF-3 PORT-OF-2
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from helpers import random_batches, small_trainer

from support import distributed
from support.distributed import shard
from training import StepAverages


def gradients(sync_bn, count, rank, world_size):
    """Return the gradients of G and of D after a step that leaves the weights as they are."""
    trainer = small_trainer(lr=0.0, sync_bn=sync_bn, shard_size=count // world_size)
    trainer.step(shard(random_batches(1, count)[0], rank, world_size))
    return [[p.grad.clone() for p in net.parameters()] for net in (trainer.netG, trainer.netD)]


def train(trainer, start, stop, rank, world_size):
    """Take the steps from `start` to before `stop`, of 12 images, or 6 at the end of an epoch of 7 steps."""
    for i in range(start, stop):
        batch = random_batches(1, 6 if i % 7 == 6 else 12, seed=i)[0]
        trainer.step(shard(batch, rank, world_size))
    return copy.deepcopy(trainer.state_dict())


def averages(rank):
    """Return the averages over two steps whose results differ from process to process."""
    means = StepAverages()
    for value in (1.0, 2.0):
        means.add(torch.full((7,), value * (rank + 1)), 12)
    return means.compute()


def results(rank, world_size):
    """Return what one process finds."""
    process = (rank, world_size)
    found = {(sync_bn, count): gradients(sync_bn, count, *process) for sync_bn in (False, True) for count in (12, 6)}
    for sync_bn in (False, True):
        settings = {"sync_bn": sync_bn, "augment": "color,translation,cutout"}
        first, second = small_trainer(**settings), small_trainer(1, **settings)
        second.load_state_dict(train(first, 0, 10, *process))
        trained = [train(trainer, 10, 20, *process) for trainer in (first, second)]
        found["unbroken", sync_bn], found["resumed", sync_bn] = trained
    found["averages"] = averages(rank)
    found["gathered"], found["broadcast"] = distributed.all_gather_object(rank), distributed.broadcast_object(rank)
    found["max"] = distributed.all_reduce_max(rank)
    found["mean"] = distributed.all_reduce_mean(torch.tensor([float(rank), 1.0]))
    return found


def main():
    folder, rank, *ports = sys.argv[1:]
    for world_size, port in zip((3, 2), ports, strict=True):
        if int(rank) < world_size:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ |= {"WORLD_SIZE": str(world_size), "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            found = results(*distributed.init_distributed())
            torch.save(found, f"{folder}/{world_size}-{rank}.pth")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.run_and_exit(main)
