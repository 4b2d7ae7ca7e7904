"""topk_ortho_r4 = prune + topk_ortho_r3: the rarer of near-parallel latents restarts (pruning).

Why: the penalty parts pairs slowly, and only those in question; two latents that are nearly one are
better made two at once. What is pruned, and how, is in prune.

Found (default job, seed 0): 10 of 1,024 latents are pruned.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.34, the baseline's 0.40: can't
be told from it; explained variance is 0.561, the baseline's 0.616: worse. On a real model (3 seeds)
explained variance is 0.782, the baseline's 0.782: no difference that matters.
"""
from variants.prune import Variant as Prune
from variants.topk_ortho_r3 import Variant as Base


class Variant(Prune, Base):
    prune_threshold = 0.6         # the note's 0.8: under the penalty hardly any pair is that near
    off = {"prune_every": 0.0}
