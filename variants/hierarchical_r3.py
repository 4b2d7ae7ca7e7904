"""hierarchical_r3 = latent_l1 on hierarchical_r2 + a target rate for each (adaptive targets).

    L1 weight of a latent = own rate / target,   target = mean rate ^ power * own rate ^ (1 - power)

power is latent_l1_power: at 0 each latent is left alone, at 1 all shall fire equally often. Rates
are those in the window. So what fires often pays more, what fires rarely less, at the same L0.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.48, the baseline's 0.40: can't
be told from it; explained variance is 0.543, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.767, the baseline's 0.782: worse.
"""
from variants.hierarchical_r2 import Variant as Base
from variants.latent_l1 import Variant as LatentL1


class Variant(LatentL1, Base):
    target_memory = 0.05          # fraction of the run over which an L1 weight moves
    latent_l1_weight = 0.1        # topk, batch_topk; latent_l1's 0.03 hardly acts here
    off = {"latent_l1_power": 0.0}

    def build(self):
        super().build()
        self.track("l1_of", fresh=1.0, memory=self.target_memory, start=1.0)

    def l1_weights(self):
        return self.l1_of

    def after_step(self, opt, out):
        super().after_step(opt, out)
        share = self.window / self.window.mean().clamp_min(1e-12)
        self.follow("l1_of", share ** self.latent_l1_power)
