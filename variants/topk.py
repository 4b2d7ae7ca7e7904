"""topk = baseline with the TopK activation: the l0 highest of a row fire, no L1 penalty (Gao 2024).

Nothing taxes an act, so nothing shrinks an act.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.50, the baseline's 0.40: can't
be told from it; explained variance is 0.807, the baseline's 0.616: better. On a real model (3
seeds) explained variance is 0.807, the baseline's 0.782: better.
"""
from sae import SAE


class Variant(SAE):
    activation = "topk"
    off = {"activation": "relu"}
