"""adaptive_ortho_r5 = latent_lr on adaptive_ortho_r4 + equal moves, 4 micro-batches (adaptive_lr).

    a latent's factor on its learning rate = (mean move / own usual move) ^ latent_lr_power

within latent_lr's bounds, 0.1 to 10: latents whose gradients are small or noisy lag behind, here
all move alike, but for the lengths of encoder columns (r4's gains). The gradient is accumulated
over 4 micro-batches, for a quarter of the memory of the graph.

On toys (300 steps) it costs explained variance: 0.545, the parent 0.551.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.49, the baseline's 0.40: can't
be told from it; explained variance is 0.577, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.775, the baseline's 0.782: no difference that matters.
"""
from variants.adaptive_ortho_r4 import Variant as Base
from variants.latent_lr import Variant as LatentLR


class Variant(LatentLR, Base):
    micro_batches = 4
    latent_lr_power = 1.0     # 1: all moves become alike
    off = {"latent_lr_low": 1.0, "latent_lr_high": 1.0, "micro_batches": 1}

    def build(self):
        super().build()
        self.track("usual_move")          # length of the decoder row's move by Adam

    def move_scale(self):
        _, W_dec, _ = self.old
        self.follow("usual_move", (self.W_dec - W_dec).norm(dim=1))
        moves = self.usual_move + 1e-12
        return (moves.mean() / moves) ** self.latent_lr_power
