"""adaptive_ortho_r5 = latent_lr on adaptive_ortho_r4 + the factors make the latents' updates alike; 4 micro-batches (adaptive_lr).

Latents whose gradients are small or noisy lag behind; here all move alike. A latent's factor, within latent_lr's bounds, is the mean length
of the latents' moves over its own usual one. The gradient is accumulated over 4 micro-batches (a setting of the base: a quarter of the
memory for the graph).

Found on toys (300 steps, 3 seeds): spread of the latents' total moves (standard deviation of their logarithm) goes from 0.085 to 0.006;
explained variance 0.485 -> 0.481. Adam had made the updates nearly alike already.
Costs: time 1.8, memory 1.18 of the base's.
"""
import torch

from variants.adaptive_ortho_r4 import Variant as Base
from variants.latent_lr import Variant as LatentLR


class Variant(LatentLR, Base):
    micro_batches = 4
    latent_lr_even = 1.0      # factor = (mean move / the latent's usual move) ^ this
    off = {"latent_lr_low": 1.0, "latent_lr_high": 1.0, "micro_batches": 1}

    def build(self):
        super().build()
        self.register_buffer("usual_move", torch.zeros(self.d_sae))        # length of the decoder row's move by Adam, moving average
        self.latents["usual_move"] = (0, None)

    def move_scale(self):
        self.usual_move.lerp_((self.W_dec - self.old[1]).norm(dim=1), self.memory(0.02))
        return ((self.usual_move.mean() + 1e-12) / (self.usual_move + 1e-12)) ** self.latent_lr_even
