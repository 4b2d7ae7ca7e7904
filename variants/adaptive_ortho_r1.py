"""adaptive_ortho_r1 = ortsae + latents that fire together form groups, inside which directions may be shared (ortho).

Two latents that fire on the same rows may need a common direction, two that never meet need none: the penalty on a pair is full across
groups and (1 - ortho_share) of it inside one. The groups are updated from a batch at intervals: each latent goes to the group with whose
members its firing correlates most (a k-means step on the latents' firing over the rows).

`ortho_form = mean` is the note's form, the mean over all pairs of the weighted squared cosine. As 1 / d_in of the reconstruction error it
acts on nothing, so it is taken times d_in, as in fixed_ortho; it needs no chunks.

Found on toys with correlated features (300 steps, 3 seeds; no penalty, ortsae, this): mean squared positive cosine across groups 0.025,
0.013, 0.010, inside 0.120, 0.033, 0.112; explained variance 0.736, 0.693, 0.704. Sharing gives back a part of orthogonality's cost.
Costs: time 1.5, memory 1.23 of the base's.
"""
import torch

from sae import Refuse, generator, unit
from variants.ortsae import Variant as Base


class Variant(Base):
    ortho_form = "max"        # max: each latent's largest cosine, as in ortsae | mean: all pairs, times d_in
    ortho_share = 0.9         # how much of the penalty is waived inside a group
    ortho_groups = 16
    ortho_update = 0.02       # the groups are updated every such fraction of the run
    off = {"ortho_form": "max", "ortho_share": 0.0}

    def build(self):
        super().build()
        if self.ortho_form not in ("max", "mean"):
            raise Refuse(f"--set ortho_form={self.ortho_form}: want max or mean", 2)
        self.register_buffer("group", torch.randint(self.ortho_groups, (self.d_sae,), generator=generator(self.seed, "group")))
        self.latents["group"] = (0, None)

    def pair_weight(self, i, j):
        return 1 - self.ortho_share * (self.group[i] == self.group[j])

    def ortho(self):
        if self.ortho_form == "max":
            return super().ortho()
        blocks = [self.W_dec.index_select(0, (self.group == g).nonzero().flatten()) for g in range(self.ortho_groups)]
        grams = [block.T @ block for block in blocks]          # a block's squared cosines sum to those of its [d_in, d_in] product
        pairs = sum(grams).square().sum() - self.ortho_share * sum(g.square().sum() for g in grams)
        selves = (1 - self.ortho_share) * self.W_dec.square().sum(-1).square().sum()
        return self.d_in * (pairs - selves) / (self.d_sae * (self.d_sae - 1))

    @torch.no_grad()
    def after_step(self, opt, out):
        super().after_step(opt, out)
        if self.due(self.ortho_update):
            fires = (out.acts > 0).float()
            fires = unit((fires - fires.mean(0)).T)                                        # [d_sae, B]: products are correlations
            centres = unit(fires.new_zeros(self.ortho_groups, len(out.x)).index_add(0, self.group, fires))
            self.group.copy_(torch.where((out.acts > 0).any(0), (fires @ centres.T).argmax(1), self.group))
            self.stats["largest_group"] = self.group.bincount().max()
