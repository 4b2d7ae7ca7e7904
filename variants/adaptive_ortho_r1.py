"""adaptive_ortho_r1 = ortsae + latents that fire together may share directions (ortho).

    ortsae = mean over i of  max over j of  w_ij * max(cos(d_i, d_j), 0)^2
    w_ij = 1 - ortho_share inside a group, 1 across groups

Two latents that fire on the same rows may need a common direction; two that never meet need none.
Groups are updated at intervals: each latent goes to the group with whose members, itself among
them, its firing correlates most (one k-means step over the rows of the batch). One batch says
little: on a real model (512 rows) 47 % of the latents change their group at each update, to the
end, on known features 5 %. ortho_form=mean is the note's: the mean over all pairs of w_ij cos^2. As
a mean it is about 1 / d_in and acts on nothing, so it is taken times d_in. The weight is OrtSAE's
0.25; the note's is 0.1 (ortsae_weight=0.1).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.39, the baseline's 0.40: no
difference that matters; explained variance is 0.604, the baseline's 0.616: worse. On a real model
(3 seeds) explained variance is 0.781, the baseline's 0.782: no difference that matters.
"""
import torch

from sae import choice, generator, unit
from variants.ortsae import Variant as Base


class Variant(Base):
    ortho_form = choice("max", "mean")
    ortho_share = 0.9         # how much of the penalty is waived inside a group
    ortho_groups = 16
    ortho_update = 0.02       # the groups are updated every such fraction of the run
    off = {"ortho_form": "max", "ortho_share": 0.0}
    counts = totals = ("regrouped",)      # latents that have changed their group

    def build(self):
        super().build()
        rng = generator(self.seed, "group")
        group = torch.randint(self.ortho_groups, (self.d_sae,), generator=rng)
        self.register_buffer("group", group)

    def pair_weight(self, i, j):
        return 1 - self.ortho_share * (self.group[i] == self.group[j])

    def ortho(self):
        if self.ortho_form == "max":
            return super().ortho()
        # the squared cosines of a block of rows sum to those of its [d_in, d_in] product
        grams = []
        for g in range(self.ortho_groups):
            block = self.W_dec.index_select(0, (self.group == g).nonzero().flatten())
            grams.append(block.T @ block)
        inside = sum(gram.square().sum() for gram in grams)
        pairs = sum(grams).square().sum() - self.ortho_share * inside
        selves = (1 - self.ortho_share) * self.W_dec.square().sum(-1).square().sum()
        return self.d_in * (pairs - selves) / (self.d_sae * (self.d_sae - 1))

    def after_step(self, opt, out):
        super().after_step(opt, out)
        if self.due(self.ortho_update):
            group = self.nearest_groups(out.acts > 0)
            self.regrouped += (group != self.group).sum()
            self.group.copy_(group)

    def nearest_groups(self, fires):
        """The group that each latent's firing, fires [B, d_sae], correlates most with [d_sae]."""
        columns = fires.float()
        columns = unit((columns - columns.mean(0)).T)          # products of rows are correlations
        centres = columns.new_zeros(self.ortho_groups, len(fires)).index_add(0, self.group, columns)
        nearest = (columns @ unit(centres).T).argmax(1)
        return torch.where(fires.any(0), nearest, self.group)  # a silent latent stays
