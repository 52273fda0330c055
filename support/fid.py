"""Which epoch to keep: the Fréchet distance of a generator's pictures to the photographs (Heusel et al. 2017)."""

import importlib.util
import pickle
import sys

import torch
from tqdm import tqdm

from models import pictures
from support.errors import ModelError, RunError
from support.files import write_whole
from support.latents import latents
from support.weights import read_file

REAL = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # the photographs' in torchmetrics
AT_ONCE = 256  # pictures
NEEDS = "--fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'"


class Judge:
    """Measures generators against `images`, an Images, by `count` pictures of each.

    feature: the network, which takes uint8 (N, 3, s, s) and returns (N, F), and says F as num_features; None: Inception
    v3, which torchmetrics downloads once. What it says of the photographs is kept beside their prepared array. Raises
    RunError if torchmetrics, or that network, is not to be had, or if there are too few pictures.
    """

    @staticmethod
    def check():
        """Raise RunError if what it needs is not installed."""
        if not all(importlib.util.find_spec(name) for name in ("torchmetrics", "torch_fidelity")):
            raise RunError(NEEDS)

    def __init__(self, images, count, device, feature=None):
        if min(count, len(images)) < 2:
            raise RunError(f"--fid needs 2 pictures at least, of each kind; there are {len(images)} and {count}")
        self.device = device if device.type == "cuda" else torch.device("cpu")  # it computes in float64
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            # The others of several processes do not come here: nothing is to be exchanged with them.
            metric = FrechetInceptionDistance(feature or 2048, reset_real_features=False, sync_on_compute=False)
        except ImportError:
            raise RunError(NEEDS) from None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, half a file, a page
            why = " ".join(str(error).split())[:200]
            where = f"{torch.hub.get_dir()}/checkpoints"
            raise RunError(
                f"--fid: Inception's weights cannot be downloaded to {where}, or read there ({why})"
            ) from None
        self.metric, self.count = metric.to(self.device).eval(), count
        self._see(images, "inception" if feature is None else type(feature).__name__)

    def _see(self, images, name):
        """Take in the photographs, or what was kept of them."""
        kept = images.path.with_name(f"{images.path.stem}-{name}.fid") if images.path else None
        try:
            state = read_file(kept) if kept else {}
        except ModelError:  # there is none, or it is damaged
            state = {}
        shapes = {name: getattr(self.metric, name).shape for name in REAL}
        if not isinstance(state, dict) or {name: getattr(state.get(name), "shape", None) for name in REAL} != shapes:
            with tqdm(total=len(images), desc="photographs' features", unit="img", disable=None) as bar:
                for batch in images.batches(AT_ONCE, seed=0, epoch=0):
                    self._update(batch, real=True)
                    bar.update(len(batch))
            state = {name: getattr(self.metric, name).cpu() for name in REAL}
            try:
                if kept:
                    write_whole(kept, lambda file: torch.save(state, file))
            except OSError as error:
                print(f"warning: the next run must look at the photographs again: {error}", file=sys.stderr)
        for name in REAL:
            setattr(self.metric, name, state[name].to(self.device))

    @torch.no_grad()
    def _update(self, batch, real):
        if len(batch):
            batch = batch.to(self.device)
            try:
                self.metric.update(batch if batch.shape[1] == 3 else batch.expand(-1, 3, -1, -1), real=real)
            except torch.OutOfMemoryError:
                why = f"{self.device} has too little memory for {AT_ONCE} pictures in Inception"
                raise RunError(f"--fid: {why}; --fid 0 goes on without it") from None

    def distance(self, netG, stopped=lambda: False):
        """Return the Fréchet distance of G's pictures of seeds 0, 1, ... to the photographs: 0 is best.

        None if stopped() meanwhile. Raises RunError if the network takes too much memory.
        """
        self.metric.reset()  # but for the photographs
        with tqdm(total=self.count, desc="samples' features", unit="img", disable=None, leave=False) as bar:
            for start in range(0, self.count, AT_ONCE):
                if stopped():
                    return None
                z = latents(range(start, min(start + AT_ONCE, self.count)), netG.nz)
                self._update(pictures(netG, z), real=False)
                bar.update(len(z))
        return float(self.metric.compute())
