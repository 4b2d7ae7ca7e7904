"""hierarchical_r2 = revive on hierarchical_r1: silent latents restart from bad rows (resampling).

A schedule that starts sparse starves latents before their time comes. Those that were silent for a
tenth of the run start anew every fifth of it (Bricken 2023), optimizer moments cleared.

On the default data it idles: at most one latent falls silent.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.39, the baseline's 0.40: no
difference that matters; explained variance is 0.569, the baseline's 0.616: worse. On a real model
(5 seeds) explained variance is 0.769, the baseline's 0.782: worse.
"""
from variants.hierarchical_r1 import Variant as Base
from variants.revive import Variant as Revive


class Variant(Revive, Base):
    off = {"revive_every": 0.0}
