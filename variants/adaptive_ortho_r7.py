"""adaptive_ortho_r7 = adaptive_ortho_r6 + the orthogonality penalty ramps up (curriculum).

Latents first find their features and are then parted. The note ramps over the whole run
(curriculum_ramp=1); the learning rate falls in its last fifth, where little can be parted any more.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.48, the baseline's 0.40: can't
be told from it; explained variance is 0.516, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.758, the baseline's 0.782: worse.
"""
from variants.adaptive_ortho_r6 import Variant as Base


class Variant(Base):
    curriculum_start = 0.1    # part of the weight at the start (the note: 0.01 of 0.1) ...
    curriculum_ramp = 0.5     # ... rising to all of it over this fraction of the run
    off = {"curriculum_start": 1.0}
    counts = ("curriculum",)              # part of the weight now

    def penalty_scale(self, name):
        scale = super().penalty_scale(name)
        if name != "ortsae":
            return scale
        start = self.curriculum_start
        self.stats["curriculum"] = start + (1 - start) * self.ramp(self.curriculum_ramp)
        return scale * self.stats["curriculum"]
