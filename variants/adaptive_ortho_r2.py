"""adaptive_ortho_r2 = adaptive_ortho_r1 + the plain loop made sound in one switchable piece (loop_fix).

The note's loop trained for 48 steps, from b_dec = 0, at the full learning rate from the first step. In every run here rows are
normalised, b_dec starts at the data's mean and the learning rate warms up. The last two can be taken away to see what they do
(--set loop_fix=none; rows come normalised from 02_train.py). loop_fix=sound is the parent; the default goes two steps further:
* b_dec starts at the geometric median, which some rows of enormous norm can't drag away as they do the mean. The biases follow, so that
  pre-activations stay as they were.
* the steps that were taken are counted, and a run that ends with fewer than loop_taken of those asked for has failed.

Found on toys (300 steps, 3 seeds): `none` has an error of 0.61 over the first tenth against 0.33, and ends at an explained variance of 0.37
against 0.48. Mean or median makes no difference (0.483 both) unless there are outliers.
Costs: time 1.6, memory 1.23 of the base's.
"""
import torch

from sae import Refuse
from variants.adaptive_ortho_r1 import Variant as Base


class Variant(Base):
    loop_fix = "median"       # median: all of the above | sound: as the parent | none: b_dec = 0 and no warm-up, as in the note
    loop_taken = 0.9          # share of the steps asked for that must be taken
    off = {"loop_fix": "sound"}

    def build(self):
        super().build()
        if self.loop_fix not in ("median", "sound", "none"):
            raise Refuse(f"--set loop_fix={self.loop_fix}: want median, sound or none", 2)
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def init_from_data(self, x):
        super().init_from_data(x)
        if self.loop_fix != "sound":
            centre = self.geometric_median(x) if self.loop_fix == "median" else torch.zeros_like(self.b_dec)
            self.b_enc += (centre - self.b_dec) @ self.W_enc
            self.b_dec.copy_(centre)

    def geometric_median(self, x, rounds=20):
        """The point whose distances to the rows of x sum to the least, by Weiszfeld's iteration."""
        centre = x.mean(0)
        for _ in range(rounds):
            near = 1 / (x - centre).norm(dim=1, keepdim=True).clamp_min(1e-6)
            centre = (near * x).sum(0) / near.sum()
        return centre

    def lr_scale(self):
        return 1.0 if self.loop_fix == "none" and self.progress < 0.5 else super().lr_scale()

    def accept(self, loss):
        """Asked in every step, taken or not, so also in the last."""
        good = super().accept(loss)
        if self.loop_fix == "median" and self.step + 1 == self.steps and self.steps_taken + good < self.loop_taken * self.steps:
            raise Refuse(f"only {int(self.steps_taken + good)} of {self.steps} steps were taken, the others refused", 5)
        return good

    @torch.no_grad()
    def after_step(self, opt, out):
        super().after_step(opt, out)
        self.steps_taken += 1
        self.stats["steps_taken"] = self.steps_taken
