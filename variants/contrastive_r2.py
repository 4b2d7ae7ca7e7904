"""contrastive_r2 = contrastive_r1 + the threshold tau falls over the run (cosine_threshold).

    tau(t) = con_tau_end + (con_tau - con_tau_end) (1 + cos(pi t)) / 2,   t in [0, 1] the progress

Why: be lenient while latents look for their features, strict at the end. The note ends at 0.05
(con_tau_end=0.05), which is below the cosines of random directions in a few hundred dimensions.

Found (toy mixture, ReLU, L0 4, 300 steps, seeds 0 and 1): mean largest |cosine| of a used latent
0.31 and 0.31 instead of 0.42 and 0.42, explained variance 0.545 and 0.538 instead of 0.561 and
0.551.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.45, the baseline's 0.40: no
difference that matters; explained variance is 0.599, the baseline's 0.616: worse. On a real model
(3 seeds) explained variance is 0.782, the baseline's 0.782: no difference that matters.
"""
import math

from variants.contrastive_r1 import Variant as Base


class Variant(Base):
    con_tau_end = 0.2         # tau starts at con_tau
    off = {"con_tau_end": 0.4}
    counts = ("tau", "con_pairs")

    def tau(self):
        annealed = (1 + math.cos(math.pi * self.progress)) / 2
        tau = self.con_tau_end + (self.con_tau - self.con_tau_end) * annealed
        self.stats["tau"] = tau
        return tau
