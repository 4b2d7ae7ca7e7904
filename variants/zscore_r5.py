"""zscore_r5 = zscore_r4 + latent_lr by importance: who carries much learns fast and pays less L1.

    worth = moving average of the latent's act: the length that it adds to reconstructions
    factor on its move = (worth / mean worth) ^ worth_power, within latent_lr's bounds
    worth_l1 = mean over rows of sum_i acts_i / factor_i / sqrt(d_in)

The note scales gradients, which Adam divides out again. A positive worth_power makes the rich
richer, a negative one evens out.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.61, the baseline's 0.40: worse;
explained variance is 0.789, the baseline's 0.616: better. On a real model (5 seeds) explained
variance is 0.844, the baseline's 0.782: better.
"""
from variants.latent_lr import Variant as LatentLR
from variants.zscore_r4 import Variant as Base


class Variant(LatentLR, Base):
    worth_power = 1.0
    worth_memory = 0.1        # fraction of the run that worth is averaged over
    worth_l1_weight = 0.01
    off = {"latent_lr_low": 1.0, "latent_lr_high": 1.0, "worth_l1_weight": 0.0}
    fixed = {"latent_lr_power": "worth_power takes its place"}

    def build(self):
        super().build()
        self.track("worth", memory=self.worth_memory, start=1.0)

    def move_scale(self):
        return (self.worth / self.worth.mean().clamp_min(1e-12)).clamp_min(1e-6) ** self.worth_power

    def penalties(self, out):
        price = 1 / self.move_scale().clamp(self.latent_lr_low, self.latent_lr_high)
        return super().penalties(out) | {"worth_l1": (out.acts @ price).mean() / self.d_in ** 0.5}

    def reset_latents(self, opt, which, directions, x, encoder=1.0):
        super().reset_latents(opt, which, directions, x, encoder)
        self.worth[which] = self.worth.mean()

    def after_step(self, opt, out):
        self.follow("worth", out.acts.float().mean(0))
        super().after_step(opt, out)
