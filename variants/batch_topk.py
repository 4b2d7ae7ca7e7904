"""batch_topk = baseline with the BatchTopK activation: l0 latents a row on average (Bussmann 2024).

The highest pre-activations of a whole batch fire, so a row may use more latents than its neighbour.
At inference a latent fires above a threshold, the moving average of the batches' cuts: a row is
encoded alone.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.27, the baseline's 0.40: can't
be told from it; explained variance is 0.816, the baseline's 0.616: better. On a real model (3
seeds) explained variance is 0.822, the baseline's 0.782: better.
"""
from sae import SAE


class Variant(SAE):
    activation = "batch_topk"
    off = {"activation": "relu"}
