"""batch_topk = baseline with the BatchTopK activation: l0 latents a row on average, chosen over the batch (Bussmann 2024).

A row may use more latents than its neighbour. At inference a latent fires above a threshold that is the moving average of the
batches' cuts, so that a row is encoded alone. Costs 1.17 times the base's time on one core (tests/bench/variant_cost.py).
"""
from sae import SAE


class Variant(SAE):
    activation = "batch_topk"
    off = {"activation": "relu"}
