"""contrastive_r4 = contrastive_r3 + latents active on the same rows are penalised (diversity loss).

    diversity = mean over used latents i of  sum over j != i of  c_ij c'_ij
    c, c' = cosines of the columns of acts in two halves of the batch

Why: two latents that always fire together are one. The note's own form, div_product=batch,
squares the whole batch's cosines, to which sampling alone adds 1 / rows a pair: a pressure on all
latents to fall silent. Two halves take that out. What frequent latents share by chance stays, as
acts are not centred (contrastive_r10's are). A parent and its child fire together too: the penalty
pays for absorption.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.58, the baseline's 0.40: can't
be told from it; explained variance is 0.562, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.744, the baseline's 0.782: worse.
"""
import torch

from sae import choice
from variants.contrastive_r3 import Variant as Base


class Variant(Base):
    diversity_weight = 0.1
    diversity_warmup = 0.5    # fraction of the run; L0 can settle after it
    div_latents = 512         # the most used that are compared
    div_product = choice("halves", "batch")
    off = {"diversity_weight": 0.0}
    counts = ("together",)                # mean cosine of the used latents' activations

    def overlap(self, acts, latents):
        """Products of the cosines in two halves of the columns of acts of `latents` (batch: squared
        cosines), 0 on the diagonal [n, n]."""
        others = 1 - torch.eye(len(latents), device=acts.device)
        first, second = (acts[::2], acts[1::2]) if self.div_product == "halves" else (acts, acts)
        first = self.column_cosines(first, latents) * others
        self.stats["together"] = first.detach().mean()
        return first * self.column_cosines(second, latents)

    def penalties(self, out):
        latents = self.most_used(self.div_latents)
        diversity = self.overlap(out.acts, latents).sum() / len(latents)
        return super().penalties(out) | {"diversity": diversity}
