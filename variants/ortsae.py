"""ortsae = baseline + each latent is pushed away from the nearest of a random chunk (OrtSAE 2025).

    ortsae = mean over latents i of max(0, max over j != i of its chunk of cos(d_i, d_j))^2

Absorption and composition show as latents whose directions overlap; this charges each latent for
its largest overlap. Chunks of the dictionary are drawn in every step, so that every pair meets now
and then; up to ortsae_chunk latents are one chunk, all pairs. Cosines, not their absolute values:
opposite directions do no harm. The paper has it on BatchTopK (--set activation=batch_topk).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.43, the baseline's 0.40: no
difference that matters; explained variance is 0.600, the baseline's 0.616: worse. On a real model
(3 seeds) explained variance is 0.781, the baseline's 0.782: no difference that matters.
"""
import torch

from sae import SAE


class Variant(SAE):
    ortsae_weight = 0.25      # the paper's
    ortsae_chunk = 8192       # latents that are compared with each other
    off = {"ortsae_weight": 0.0}
    nearest_at = None         # the step of self.nearest

    def penalties(self, out):
        return super().penalties(out) | {"ortsae": self.ortho()}

    def ortho(self):
        """The penalty. The nearest latents are looked for once for all micro-batches."""
        if self.nearest_at != self.step:
            self.nearest_at, self.nearest = self.step, self.find_nearest()
        cos = (self.W_dec * self.W_dec.index_select(0, self.nearest)).sum(-1)      # rows are unit
        latents = torch.arange(self.d_sae, device=cos.device)
        return (self.pair_weight(latents, self.nearest) * cos.relu().square()).mean()

    @torch.no_grad()
    def find_nearest(self):
        """For each latent, the one of its chunk that it overlaps most with, by weight [d_sae]."""
        rng = self.generator("ortsae")
        order = torch.randperm(self.d_sae, generator=rng, device=self.W_dec.device)
        nearest = torch.empty_like(order)
        for chunk in order.tensor_split(-(-self.d_sae // self.ortsae_chunk)):
            rows = self.W_dec[chunk]
            overlap = (rows @ rows.T).relu().square() * self.pair_weight(chunk[:, None], chunk)
            nearest[chunk] = chunk[overlap.fill_diagonal_(-1).argmax(1)]
        return nearest

    def pair_weight(self, i, j):
        """Weight of the pairs of latents (i, j)."""
        return 1.0
