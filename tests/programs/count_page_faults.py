"""Print the median number of page faults of a training step, before and after tune_device, as JSON."""

import json
import resource
import statistics

import torch

from models import Discriminator, Generator
from support.accelerator import tune_device
from training import Trainer, TrainerSettings

nets = Generator(10, 1), Discriminator(1)
trainer = Trainer(*nets, torch.device("cpu"), TrainerSettings(ema=0))
batch, medians = torch.zeros(704, 3, 64, 64, dtype=torch.uint8), []  # as floats 35 MB, which malloc always returns
for tuned in (False, True):
    if tuned:
        tune_device(torch.device("cpu"))
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        trainer.step(batch)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    medians.append(statistics.median(faults[1:]))
print(json.dumps(medians))
