"""Which epoch to keep: the Frechet distance of generated images to real ones (Heusel et al. 2017, arXiv:1706.08500).

It compares means and covariances of the features of a network (equation 6). With few images, a DCGAN can peak and then
degrade; this number tells when.
"""

import importlib.util
import pickle
import sys

import torch
from tqdm import tqdm

from support.accelerator import is_out_of_memory, reproducible_kernels
from support.errors import UserError, error_text
from support.files import write_atomically
from support.latents import latents
from support.weights import read_file

REAL_FEATURES = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # torchmetrics' names
BATCH = 256  # images
MISSING_PACKAGES = "--fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'"


def check_installed():
    """Raise UserError if the packages for --fid are not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torchmetrics", "torch_fidelity")):
        raise UserError(MISSING_PACKAGES)


class FidMeter:
    """Measures generators against `images`, a PreparedImages, with `count` samples each.

    generate: a function of (netG, z) that returns uint8 images, as models.generate_images. feature: the network, which
    takes uint8 (N, 3, s, s), returns (N, F), and has F as num_features (None: Inception v3, downloaded once). Features
    of the real images are cached beside their prepared array. Raises UserError if Inception cannot be loaded, or if
    there are fewer than two images of a kind; check_installed finds missing packages.
    """

    def __init__(self, images, count, device, generate, feature=None):
        if min(count, len(images)) < 2:
            raise UserError(f"--fid needs at least 2 real images and 2 samples; there are {len(images)} and {count}")
        self.device = device if device.type == "cuda" else torch.device("cpu")  # it computes in float64
        self.count, self.generate = count, generate
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            # Rank 0 alone measures: nothing is to be exchanged with the other processes.
            metric = FrechetInceptionDistance(feature or 2048, reset_real_features=False, sync_on_compute=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, a damaged download
            where = f"{torch.hub.get_dir()}/checkpoints"
            raise UserError(
                f"--fid: Inception's weights cannot be downloaded to {where}, or read there ({error_text(error)})"
            ) from None
        self.metric = metric.to(self.device).eval()
        self.load_real_features(images, "inception" if feature is None else type(feature).__name__)

    def load_real_features(self, images, name):
        """Give the metric the sums over the features of real images, from the cache or computed."""
        cached = images.path.with_name(f"{images.path.stem}-{name}.fid") if images.path else None
        try:
            state = read_file(cached) if cached else {}
        except UserError:  # there is none, or it is damaged
            state = {}
        shapes = [getattr(self.metric, name).shape for name in REAL_FEATURES]
        if not isinstance(state, dict) or [getattr(state.get(n), "shape", None) for n in REAL_FEATURES] != shapes:
            state = self.compute_real_features(images)
            try:
                if cached:
                    write_atomically(cached, lambda file: torch.save(state, file))
            except OSError as error:
                print(f"warning: the next run must compute the real images' features again: {error}", file=sys.stderr)
        for name in REAL_FEATURES:
            setattr(self.metric, name, state[name].to(self.device))

    def compute_real_features(self, images):
        """Return {name: tensor} of the metric's sums over the features of all images."""
        with tqdm(total=len(images), desc="features of real images", unit="img", disable=None) as bar:
            for batch in images.batches(BATCH, seed=0, epoch=0):
                self.update(batch, real=True)
                bar.update(len(batch))
        return {name: getattr(self.metric, name).cpu() for name in REAL_FEATURES}

    @torch.no_grad()
    def update(self, batch, real):
        batch = batch.to(self.device)
        try:
            with reproducible_kernels():
                self.metric.update(batch if batch.shape[1] == 3 else batch.expand(-1, 3, -1, -1), real=real)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = f"{self.device} has too little memory for {BATCH} images in Inception"
            raise UserError(f"--fid: {why}; leave it out, or continue this run with --resume --fid 0") from None

    def distance(self, netG, should_stop=lambda: False):
        """Return the FID of G's images of seeds 0, 1, ... to the real ones (0 is best).

        Returns None if should_stop(). Raises UserError if the network takes too much memory.
        """
        self.metric.reset()  # all but the real images' features
        with tqdm(total=self.count, desc="features of samples", unit="img", disable=None, leave=False) as bar:
            for start in range(0, self.count, BATCH):
                if should_stop():
                    return None
                z = latents(range(start, min(start + BATCH, self.count)), netG.nz)
                self.update(self.generate(netG, z), real=False)
                bar.update(len(z))
        return float(self.metric.compute())
