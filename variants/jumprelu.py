"""jumprelu = baseline with JumpReLU: each latent learns its threshold (Rajamanoharan 2024b).

L1 shrinks every act; here an act is the whole pre-activation, or nothing below the threshold, and
the penalty counts latents instead of adding up acts. A controller on the penalty's weight holds L0
at l0.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.26, the baseline's 0.40: better;
explained variance is 0.838, the baseline's 0.616: better. On a real model (3 seeds) explained
variance is 0.821, the baseline's 0.782: better.
"""
from sae import SAE


class Variant(SAE):
    activation = "jumprelu"
    off = {"activation": "relu"}
