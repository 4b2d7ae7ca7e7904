"""topk_ortho_r9 = revive + topk_ortho_r8: latents that hardly fire restart (reallocation).

Why: pruning and inhibition can leave latents that fire too rarely to learn. A latent restarts in a
random direction if its rate is below reallocate_below times the mean rate l0 / d_sae. On the
default data it idles: none does (seed 0).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.57, the baseline's 0.40: worse;
explained variance is 0.464, the baseline's 0.616: worse. On a real model (5 seeds) explained
variance is 0.757, the baseline's 0.782: worse.
"""
from variants.revive import Variant as Revive
from variants.topk_ortho_r8 import Variant as Base


class Variant(Revive, Base):
    revive_from = "random"        # the note's
    reallocate_below = 0.01
    off = {"revive_every": 0.0}
    fixed = {"revive_silent": "a latent's rate decides"}

    def to_revive(self):
        return self.rate < self.reallocate_below * self.l0 / self.d_sae
