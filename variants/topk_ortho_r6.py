"""topk_ortho_r6 = latent_l1 on topk_ortho_r5 + L1 weights follow the rates (adaptive L1).

    weight_i <- weight_i exp(gain / (1 % of the steps) * clamp(rate_i / target - 1, -1, 1)),
                within l1_low .. l1_high

The note wants a tenth of all latents active, which would fix L0 at a tenth of the dictionary. Here
the base holds L0, and the target is l1_rate_target times the mean rate l0 / d_sae. The note's one
weight for all, moved by the mean error: l1_form = global; the base's weight leaves it little to do.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.59, the baseline's 0.40: worse;
explained variance is 0.440, the baseline's 0.616: worse. On a real model (3 seeds) explained
variance is 0.774, the baseline's 0.782: no difference that matters.
"""
from sae import choice
from variants.latent_l1 import Variant as LatentL1
from variants.topk_ortho_r5 import Variant as Base


class Variant(LatentL1, Base):
    l1_form = choice("latent", "global")
    l1_gain = 0.1             # a weight's move in 1 % of the run, per relative error of the rate
    l1_rate_target = 1.0      # wanted rate, over l0 / d_sae
    l1_low = 0.25             # bounds of a weight: the note's 0.01 and 0.2, over its weight 0.04
    l1_high = 5.0
    off = {"l1_gain": 0.0}
    fixed = {"latent_l1_power": "the weights follow the rates step by step"}
    counts = ("rate_error",)  # mean relative error of the latents' rates

    def build(self):
        super().build()
        self.track("l1_scale", fresh=1.0, start=1.0)

    def l1_weights(self):
        return self.l1_scale

    def after_step(self, opt, out):
        super().after_step(opt, out)
        error = self.rate / (self.l1_rate_target * self.l0 / self.d_sae) - 1
        self.stats["rate_error"] = error.abs().mean()
        if self.l1_form == "global":
            error = error.mean().expand(self.d_sae)
        move = self.l1_gain / (0.01 * self.steps) * error.clamp(-1, 1)
        self.l1_scale.mul_(move.exp()).clamp_(self.l1_low, self.l1_high)
