"""zscore_r6 = layernorm on zscore_r5: each row is normed before the encoder (layer norm).

Why: under one threshold a long row lights many latents and a short one few; normed, each gets its
share. The note's eps is layernorm_eps.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.64, the baseline's 0.40: worse;
explained variance is 0.790, the baseline's 0.616: better. On a real model (5 seeds) explained
variance is 0.847, the baseline's 0.782: better.
"""
from variants.layernorm import Variant as LayerNorm
from variants.zscore_r5 import Variant as Base


class Variant(LayerNorm, Base):
    off = {"layernorm_strength": 0.0}
