"""hierarchical_r1 = baseline + the sparsity weight falls, so that L0 rises to l0 (linear sparsity).

Few, general latents first, special ones later: so the hierarchy is hoped to be learned from the
top. What is scheduled is L0, not the weight: a weight that falls to zero ends nowhere in particular
(linear_form=weight is that, the note's; its SAE had an L0 of 1782 of 2304 latents), whereas here
the end is l0 and can be compared. linear_start above 1 is the opposite, L0 falls to l0, as is
usual for annealed TopK. The note also makes d_sae = d_in: --set d_sae=..., for its baseline too.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.39, the baseline's 0.40: no
difference that matters; explained variance is 0.569, the baseline's 0.616: worse. On a real model
(5 seeds) explained variance is 0.769, the baseline's 0.782: worse.
"""
import torch

from sae import SAE, Refuse, choice


class Variant(SAE):
    linear_start = 0.5            # L0 wanted at the start, as a multiple of l0: below 1 it rises
    linear_until = 0.5            # fraction of the run by which it is l0, linearly
    linear_form = choice("l0", "weight")    # weight: 1 / sqrt(d_sae) of itself, linearly to 0
    linear_window = 100.0         # rows per latent that `window` follows (hierarchical_r3 reads it)
    off = {"linear_start": 1.0}
    counts = ("schedule_gap",)              # mean |L0 / wanted - 1| over the run

    @classmethod
    def check(cls, settings):
        super().check(settings)
        kind, start = settings["activation"], settings["linear_start"]
        if settings["linear_form"] == "weight" and kind not in ("relu", "jumprelu"):
            raise Refuse(f"--set linear_form=weight activation={kind}: has no weight", 2)
        if settings["l0"] * start <= (0.5 if kind == "topk" else 0):
            raise Refuse(f"--set linear_start={start}: nothing could fire at first", 2)

    def build(self):
        super().build()
        if self.linear_form == "weight":
            self.sparsity_scale.fill_(1 / self.d_sae ** 0.5)
        share = self.linear_window * self.d_sae / (self.batch_size * self.steps)
        self.track("window", self.l0 / self.d_sae, memory=share, start=self.l0 / self.d_sae)
        self.register_buffer("schedule_gap", torch.zeros(()))

    def wanted_l0(self):
        ramp = self.linear_start + (1 - self.linear_start) * self.ramp(self.linear_until)
        return min(super().wanted_l0() * ramp, self.d_sae / 2)

    def steer_sparsity(self, l0):
        if self.linear_form == "weight":
            self.sparsity_scale.fill_((1 - self.progress) / self.d_sae ** 0.5)
        else:
            super().steer_sparsity(l0)

    def after_step(self, opt, out):
        fires = self.firing(out.acts)
        self.follow("window", fires)
        gap = (fires.sum() / self.wanted_l0() - 1).abs()
        self.schedule_gap.lerp_(gap.float(), 1 / (self.step + 1))
        self.stats |= {"wanted_l0": self.wanted_l0(), "schedule_gap": self.schedule_gap}
        super().after_step(opt, out)
