"""gated = baseline + a gate says which latents fire, a second path how much (Gated SAE, 2024).

    acts = (pre > 0) * relu(exp(r_mag) * (pre - b_enc) + b_mag)

L1 shrinks every act that it keeps sparse. Here L1 falls on the gate relu(pre) alone, and the sizes
are free. The step (pre > 0) passes no gradient: the gate learns from L1 and from its own
reconstruction of the row with a frozen decoder (the penalty `gated`).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.29, the baseline's 0.40: can't
be told from it; explained variance is 0.803, the baseline's 0.616: better. On a real model (3
seeds) explained variance is 0.820, the baseline's 0.782: better.
"""
import torch
from torch import nn

from sae import SAE


class Variant(SAE):
    gated_sizes = True        # False: the gate gives the sizes too, as in the baseline
    gated_weight = 1.0        # of the gate's own reconstruction error
    off = {"gated_sizes": False}

    def build(self):
        super().build()
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))     # log of the paths' ratio
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.latents |= {"r_mag": (0, 0.0), "b_mag": (0, 0.0)}

    def activate(self, pre):
        gate = super().activate(pre)
        if not self.gated_sizes:
            return gate
        return (gate > 0) * (self.r_mag.exp() * (pre - self.b_enc) + self.b_mag).relu()

    def penalties(self, out):
        found = super().penalties(out)
        if self.gated_sizes:
            x_hat = super().activate(out.pre) @ self.W_dec.detach() + self.b_dec.detach()
            found["gated"] = (out.x - x_hat).pow(2).mean()
        return found

    def sparsity(self, out):
        return super().sparsity(out._replace(acts=out.pre.relu()) if self.gated_sizes else out)

    def after_step(self, opt, out):
        """As in the base, which holds L0 by moving the gate's biases: so by the gate's acts."""
        gate = super().activate(out.pre) if self.gated_sizes else out.acts
        super().after_step(opt, out._replace(acts=gate))

    def saelens_weights(self):
        if self.activation != "relu" or not self.gated_sizes:
            return super().saelens_weights()
        return "gated", {"W_enc": self.W_enc, "W_dec": self.W_dec, "r_mag": self.r_mag,
                         "b_gate": self.b_enc / self.scale, "b_mag": self.b_mag / self.scale,
                         "b_dec": self.b_dec / self.scale + self.mean}
