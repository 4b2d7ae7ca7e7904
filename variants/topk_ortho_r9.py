"""topk_ortho_r9 = revive + topk_ortho_r8: latents that hardly fire restart in random directions (feature reallocation).

Pruning and inhibition can leave latents that fire too rarely to learn. The rate decides, so revive_silent has no part: a latent that
has been silent for a tenth of the run has less than 1 % of its rate left.
Found (mixture, 64 latents of which 32 start dead, L0 4, 3 seeds): 23, 25 and 26 dead latents at the end go to 0 (ReLU).
Costs: time 8.4, memory 1.10 of the base's.
"""
from variants.revive import Variant as Revive
from variants.topk_ortho_r8 import Variant as Base


class Variant(Revive, Base):
    revive_from = "random"
    reallocate_below = 0.01       # firing rate, over the mean rate l0 / d_sae, under which a latent restarts
    off = {"revive_every": 0.0}
    toy = {"revive_every": 0.2, "reallocate_below": 0.9}      # all latents of the small test runs fire about equally often

    def to_revive(self):
        return self.rate < self.reallocate_below * self.l0 / self.d_sae
