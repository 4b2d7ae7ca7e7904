"""skip = baseline + a path around the latents: x_hat = decode(acts) + s * (x - b_dec), s small.

A ReLU SAE under an L1 penalty reconstructs too short; the path gives back some of the length.
Unbounded, s would go to 1 and the SAE would learn nothing, so s = skip_scale * tanh(a), a learned
from 0. The start is fitted without the path. `reconstruct` has the path, `decode` has not: acts do
not carry it. s grows towards its bound as long as training lasts: the gain is what the bound
allows, nothing that latents learn.
"""
import torch
from torch import nn

from sae import SAE


class Variant(SAE):
    skip_learned = True       # False: s = skip_scale
    skip_scale = 0.1          # |s| stays below this
    off = {"skip_learned": False, "skip_scale": 0.0}
    counts = ("skip",)

    def build(self):
        super().build()
        if self.skip_learned:
            self.skip_raw = nn.Parameter(torch.zeros(()))

    def skip(self):
        """s, a number."""
        return self.skip_scale * (self.skip_raw.tanh() if self.skip_learned else 1.0)

    def forward(self, x):
        out = super().forward(x)
        s = self.skip()
        self.stats["skip"] = float(torch.as_tensor(s).detach())
        return out._replace(x_hat=out.x_hat + s * (x - self.b_dec))
