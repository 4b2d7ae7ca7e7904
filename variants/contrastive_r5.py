"""contrastive_r5 = contrastive_r4 + Gram-Schmidt on encoder columns that fire together.

Why: latents that fire together and listen in the same direction can't tell their features apart.
The most used latents are put into blocks that fire together: one leads, the others follow in the
order in which they fire with it. Inside a block Gram-Schmidt takes from each encoder column what
the columns before it listen to; its length is about kept, but a near copy fades. The note
orthogonalises the activations of a batch, which would make a row's encoding depend on the rows
beside it: no switch for that. Computed by the Cholesky factor of each block's Gram matrix, which
gives the same at once.

Found (toy mixture, ReLU, L0 4, 300 steps, seeds 0 and 1): mean |cosine| of the learned encoder
columns of latents that fire together 0.114 and 0.113 instead of 0.123 and 0.122, explained
variance 0.536 and 0.542 instead of 0.540 and 0.541.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.55, the baseline's 0.40: worse;
explained variance is 0.564, the baseline's 0.616: worse. On a real model (5 seeds) explained
variance is 0.744, the baseline's 0.782: worse.
"""
import torch

from sae import Encode
from variants.contrastive_r4 import Variant as Base


class Variant(Base):
    gs_strength = 1.0         # share of the way to orthogonal, reached over a fifth of the run
    gs_block = 8              # latents that are orthogonalised together
    gs_latents = 2048         # the most used that are put into blocks
    gs_every = 0.1            # fraction of the run; blocks are formed anew, in its first half
    gs_eps = 0.01             # on the Gram diagonal: of two equal columns the second fades
    off = {"gs_strength": 0.0}
    counts = ("gs_overlap",)              # mean |cosine| inside blocks that Gram-Schmidt takes out

    def build(self):
        super().build()
        n = min(self.gs_latents, self.d_sae) // self.gs_block * self.gs_block
        self.register_buffer("gs_order", torch.arange(n))      # latents, block after block

    def encoder(self):
        """W_enc with the columns of each block orthogonalised."""
        strength = self.gs_strength * self.ramp(0.2)
        if not strength or not len(self.gs_order):
            return self.W_enc
        with torch.autocast(self.W_enc.device.type, enabled=False):
            old = self.W_enc.index_select(1, self.gs_order).T              # [n, d_in]
            norm = old.norm(dim=1, keepdim=True)
            rows = (old / norm.clamp_min(1e-12)).view(-1, self.gs_block, self.d_in)
            eye = torch.eye(self.gs_block, device=rows.device)
            gram = rows @ rows.mT
            self.stats["gs_overlap"] = (gram.detach() - eye).abs().mean()
            lower = torch.linalg.cholesky(gram + self.gs_eps * eye)
            new = torch.linalg.solve_triangular(lower, rows, upper=False).reshape(old.shape) * norm
            return self.W_enc.index_copy(1, self.gs_order, old.lerp(new, strength).T)

    def pre_acts(self, x):
        return Encode.apply(x, self.encoder(), self.b_enc, self.b_dec)

    @torch.no_grad()
    def form_blocks(self, acts):
        """Fill each block: the most used free latent, and the free ones that fire most with it."""
        latents = self.firing(acts).topk(len(self.gs_order)).indices
        together = self.column_cosines(acts, latents).fill_diagonal_(2)
        free = torch.ones_like(latents, dtype=torch.bool)
        for block in self.gs_order.view(-1, self.gs_block):
            lead = free.float().argmax(0, keepdim=True)
            near = together.index_select(0, lead)[0].masked_fill(~free, -1)
            members = near.topk(self.gs_block).indices
            free[members] = False
            block.copy_(latents[members])

    @torch.no_grad()
    def init_from_data(self, x):
        super().init_from_data(x)
        self.form_blocks(self(x[:4096]).acts)

    def after_step(self, opt, out):
        super().after_step(opt, out)
        if self.due(self.gs_every) and self.progress < 0.5:
            self.form_blocks(out.acts)
