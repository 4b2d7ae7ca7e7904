"""hierarchical_r5 = hierarchical_r4 + latents with near-parallel decoders are merged (clustering).

Two latents for one feature split its firing between them. The rarer one's weights go into the
other's, averaged by how often they fire, and the rarer one restarts at the residual of a badly
reconstructed row, optimizer moments cleared.

It idles on the default data: in 142 steps no two latents get so near (merged 0, seed 0).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.46, the baseline's 0.40: no
difference that matters; explained variance is 0.530, the baseline's 0.616: worse. On a real model
(5 seeds) explained variance is 0.763, the baseline's 0.782: worse.
"""
import torch
from torch import nn

from sae import unit
from variants.hierarchical_r4 import Variant as Base


class Variant(Base):
    merge_every = 0.02            # fraction of the run
    merge_threshold = 0.9         # cosine of two decoder rows above which they are merged
    off = {"merge_every": 0.0}
    counts = totals = ("merged",)

    def restart(self, out):
        which, directions = super().restart(out)
        if self.due(self.merge_every):
            freed, kept = self.merging_pairs(which)
            room = len(out.x) - len(which)
            freed, kept = freed[:room], kept[:room]
            self.merge(freed, kept)
            # the first of these went to the latents that hierarchical_r2 has revived
            rows = self.bad_rows(out, len(which) + len(freed))[len(which):]
            which = torch.cat([which, freed])
            directions = torch.cat([directions, (out.x - out.x_hat)[rows]])
            self.merged += len(freed)
        return which, directions

    def merging_pairs(self, restarting):
        """(freed latents [n], those that they are merged into [n]). A latent whose nearest is freed
        too, or restarts, waits for the next time."""
        freed, kept = self.near_pairs(self.merge_threshold)
        gone = torch.cat([freed, restarting])
        usable = ~torch.isin(kept, gone) & ~torch.isin(freed, restarting)
        return freed[usable], kept[usable]

    def merge(self, freed, kept):
        """Make each kept latent its mean with the latents freed for it, weighted by rate."""
        weight = self.rate.clamp_min(1e-6)
        total = weight.index_add(0, kept, weight[freed])
        for name, (axis, _) in self.latents.items():
            if isinstance(getattr(self, name), nn.Parameter):
                rows = getattr(self, name).data.movedim(axis, 0)           # a view
                column = (-1,) + (1,) * (rows.dim() - 1)
                added = rows[freed] * (weight[freed] / total[kept]).view(column)
                rows.mul_((weight / total).view(column)).index_add_(0, kept, added)
        self.W_dec[kept] = unit(self.W_dec[kept])
