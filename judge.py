"""Which epoch to keep: the Fréchet distance of a generator's pictures to the photographs, in the features of a network.

A DCGAN often peaks and then falls apart; this number tells when (Heusel et al. 2017, arXiv:1706.08500, equation 6).
"""

import torch
from tqdm import tqdm

from models import latents, pictures, read_file
from runs import RunError, write_whole

REAL = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # the photographs' in torchmetrics
AT_ONCE = 256  # pictures


class Judge:
    """Measures generators against `images`, an Images, by `count` pictures of each.

    feature: the network, which takes uint8 (N, 3, s, s) and returns (N, F), and says F as num_features; None: Inception
    v3, which torchmetrics downloads once. What it says of the photographs is kept beside their prepared array. Raises
    RunError if torchmetrics, or that network, is not to be had.
    """

    def __init__(self, images, count, device, feature=None):
        self.device = device if device.type == "cuda" else torch.device("cpu")  # it computes in float64
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            # The others of several processes do not come here: nothing is to be exchanged with them.
            metric = FrechetInceptionDistance(feature or 2048, reset_real_features=False, sync_on_compute=False)
        except ImportError:
            raise RunError("--fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'") from None
        except (OSError, RuntimeError) as error:  # no network, half a file
            why = " ".join(str(error).split())[:200]
            raise RunError(f"--fid: Inception's weights could not be downloaded ({why})") from None
        self.metric, self.count = metric.to(self.device).eval(), count
        self._see(images, "inception" if feature is None else type(feature).__name__)

    def _see(self, images, name):
        """Take in the photographs, or what was kept of them."""
        kept = images.path.with_name(f"{images.path.stem}-{name}.fid") if images.path else None
        if kept and kept.is_file():
            state = read_file(kept)
        else:
            with tqdm(total=len(images), desc="photographs' features", unit="img", disable=None) as bar:
                for batch in images.batches(AT_ONCE, seed=0, epoch=0):
                    self._update(batch, real=True)
                    bar.update(len(batch))
            state = {name: getattr(self.metric, name).cpu() for name in REAL}
            if kept:
                write_whole(kept, lambda file: torch.save(state, file))
        for name in REAL:
            setattr(self.metric, name, state[name].to(self.device))

    @torch.no_grad()
    def _update(self, batch, real):
        if len(batch):
            batch = batch.to(self.device)
            self.metric.update(batch if batch.shape[1] == 3 else batch.expand(-1, 3, -1, -1), real=real)

    def distance(self, netG):
        """Return the Fréchet distance of G's pictures of seeds 0, 1, ... to the photographs: 0 is best."""
        self.metric.reset()  # but for the photographs
        for start in range(0, self.count, AT_ONCE):
            z = latents(range(start, min(start + AT_ONCE, self.count)), netG.nz)
            self._update(pictures(netG, z), real=False)
        return float(self.metric.compute())
