"""skip = baseline + a path around encoder and decoder, x_hat = decode(acts) + s * (x - b_dec), with a learned small s.

A ReLU SAE under an L1 penalty reconstructs too short; the path gives back some of the length. Unbounded, s would go to 1 and the SAE
would learn nothing, so s = skip_max * tanh(a), a starting at 0. Acts do not carry the path: `reconstruct` has it, `decode` has not.

Found on toys (300 steps, 3 seeds): explained variance 0.509 -> 0.573 and L2 ratio 0.814 -> 0.825; s goes to its bound with more steps
(0.06 after 300, 0.09 after 900), so what it adds is what skip_max allows, not something that the latents learned.
Costs: time 1.1, memory 1.01 of the base's.
"""
import torch
from torch import nn

from sae import SAE


class Variant(SAE):
    skip_learned = True       # s is learned, from 0 ...
    skip_max = 0.1            # ... within +- this
    skip_scale = 0.1          # s, if it is not learned
    off = {"skip_learned": False, "skip_scale": 0.0}

    def build(self):
        super().build()
        if self.skip_learned:
            self.skip_raw = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        out = super().forward(x)
        s = self.skip_max * self.skip_raw.tanh() if self.skip_learned else self.skip_scale
        self.stats["skip"] = s.detach() if self.skip_learned else s
        return out._replace(x_hat=out.x_hat + s * (x - self.b_dec))
