"""adaptive_ortho_r6 = skip on adaptive_ortho_r5 + latent dropout in training (skip_dropout).

The path takes over what any linear map could do; the dropout is hoped to spread a row over latents, so that none is indispensable.
Found on toys (300 steps, 3 seeds), explained variance whole and with 30 % of the acts lost: parent 0.481, 0.351; this 0.477, 0.378;
skip path alone 0.547, 0.432; dropout alone 0.398, 0.288. The path does the good. The dropout makes the loss by ablation smaller (0.130 ->
0.110 alone), but by shortening the whole reconstruction; nothing is gained under ablation either.
Costs: time 2.3, memory 1.18 of the base's.
"""
import torch

from variants.adaptive_ortho_r5 import Variant as Base
from variants.skip import Variant as Skip


class Variant(Skip, Base):
    latent_dropout = 0.3      # chance that the decoder does without an act, in training; the others are scaled up
    off = {"skip_learned": False, "skip_scale": 0.0, "latent_dropout": 0.0}

    def decode(self, acts):
        """Here and not in activate: which latents fire, and so L0, is counted without dropout."""
        if self.training and self.latent_dropout:
            kept = torch.empty(acts.shape, dtype=torch.uint8, device=acts.device)
            acts = acts * kept.bernoulli_(1 - self.latent_dropout, generator=self.generator("dropout")) / (1 - self.latent_dropout)
        return super().decode(acts)
