"""topk_ortho_r3 = topk_ortho_r2 + pairs pay from a score of mean + 2 std on (dynamic pairs).

    threshold = moving average of (mean + pairs_std * std) over the scores of all pairs

How many pairs pay then follows from how the scores are spread, not from a fixed share; a twentieth
of all pairs at most, which is reached if pairs_std is below 1.6 or so. On a real model 64,000 pairs
have a mean cosine of 0.07, below the target: tau rises to its bound, 0.5, where hardly any pair
pays (0.02 % of the error), here and in the rows after it.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.34, the baseline's 0.40: can't
be told from it; explained variance is 0.563, the baseline's 0.616: worse. On a real model (3 seeds)
explained variance is 0.782, the baseline's 0.782: no difference that matters.
"""
import torch

from variants.topk_ortho_r2 import Variant as Base


class Variant(Base):
    pairs_std = 2.0           # 0: the fixed share of topk_ortho_r1
    pairs_min = 10            # so many pairs pay in any case, the best
    pairs_memory = 0.02       # fraction of the run that the threshold is averaged over
    off = {"pairs_std": 0.0}
    fixed = {"pair_fraction": "pairs above a threshold pay; topk_ortho_r2 has a fixed share"}
    counts = ("pairs",)

    def build(self):
        super().build()
        self.register_buffer("pair_threshold", torch.zeros(()))

    def select_pairs(self, score):
        if not self.pairs_std:
            return super().select_pairs(score)
        known = score[score > -torch.inf].float()
        if len(known) > 1 and not self.part.start:         # once a step, by the batch's first part
            threshold = known.mean() + self.pairs_std * known.std()
            self.pair_threshold.lerp_(threshold, self.memory(self.pairs_memory))
        most = max(self.pairs_min, round(0.05 * len(known)))
        best = score.flatten().topk(min(len(known), most))
        return best.indices[:max(self.pairs_min, (best.values > self.pair_threshold).sum())]
