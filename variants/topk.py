"""topk = baseline with the TopK activation: the l0 highest of a row fire, no penalty (Gao 2024).

Nothing taxes an act, so nothing shrinks an act.
"""
from sae import SAE


class Variant(SAE):
    activation = "topk"
    off = {"activation": "relu"}
