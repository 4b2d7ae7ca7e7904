"""adaptive_ortho_r4 = adaptive_ortho_r3 + weight normalisation of the encoder (weight_norm).

    column i of the encoder = gain_i * v_i / ||v_i||           (Salimans 2016)

so that a column's length is one parameter of its own. Decoder rows are unit as in the base, which
is weight normalisation with the gain in the acts. The note also lowers the learning rate, 3e-4 to
1e-4: weight_norm_lr=0.33.

On toys (300 steps) the length of reconstructions over that of rows is 0.523, the parent's 0.520.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.38, the baseline's 0.40: no
difference that matters; explained variance is 0.604, the baseline's 0.616: worse. On a real model
(3 seeds) explained variance is 0.775, the baseline's 0.782: no difference that matters.
"""
import torch
from torch import nn

from sae import Encode
from variants.adaptive_ortho_r3 import Variant as Base


class Variant(Base):
    weight_norm = True        # of the encoder's columns
    weight_norm_lr = 1.0      # factor on every learning rate
    off = {"weight_norm": False}
    counts = ("gain_spread",)             # standard deviation of the gains' logarithms

    def build(self):
        super().build()
        self.gain = nn.Parameter(torch.ones(self.d_sae))
        self.latents["gain"] = (0, None)

    def init_from_data(self, x):
        super().init_from_data(x)
        self.gain.data = self.W_enc.detach().norm(dim=0)

    def pre_acts(self, x):
        if not self.weight_norm:
            return super().pre_acts(x)
        self.stats["gain_spread"] = self.gain.detach().log().std()
        W_enc = self.W_enc * (self.gain / self.W_enc.norm(dim=0))
        return Encode.apply(x, W_enc, self.b_enc, self.b_dec)

    def lr_scale(self):
        return self.weight_norm_lr * super().lr_scale()
