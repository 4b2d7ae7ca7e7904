"""adaptive_ortho_r6 = skip on adaptive_ortho_r5 + latent dropout in training (skip_dropout).

The path, a small learned multiple of the row, takes over what needs no latent. The dropout hides
each act from the decoder with a chance of latent_dropout and scales up the others, so that no
latent becomes indispensable. The training log is under dropout, here and in the rows after it:
compare what stage 3 measures.

What the note hopes for, a better reconstruction when random latents are lost, the path brings and
the dropout undoes. On toys (300 steps), explained variance whole and with 30 % of the acts lost:
parent 0.545, 0.400; path alone 0.596, 0.468; dropout alone 0.482, 0.353; both 0.543, 0.428. Dropout
narrows the loss by ablation (0.144 to 0.129) by shortening every reconstruction.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.47, the baseline's 0.40: can't
be told from it; explained variance is 0.514, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.758, the baseline's 0.782: worse.
"""
import torch

from variants.adaptive_ortho_r5 import Variant as Base
from variants.skip import Variant as Skip


class Variant(Skip, Base):
    latent_dropout = 0.3
    off = {"skip_learned": False, "skip_scale": 0.0, "latent_dropout": 0.0}

    def init_from_data(self, x):
        self.train(not self.latent_dropout)    # the start is fitted without dropout
        super().init_from_data(x)
        self.train()

    def decode(self, acts):
        """Here and not in activate(): which latents fire, and so L0, is counted without dropout."""
        if self.training and self.latent_dropout:
            keep = 1 - self.latent_dropout
            rng = self.generator(f"dropout {self.part.start}")            # each micro-batch its own
            kept = torch.empty_like(acts, dtype=torch.bool)
            kept.bernoulli_(keep, generator=rng)
            acts = acts * kept / keep
        return super().decode(acts)
