"""adaptive_ortho_r8 = layernorm on adaptive_ortho_r7 + losses, lr warm up (layernorm_warmup).

Over the first gentle_warmup of the run the orthogonality penalty rises from 0 and the learning rate
from a tenth of itself. gentle_losses=all is the note's: all penalties rise from 0, sparsity's too.
The controller that holds L0 has to undo that, so it is not the default.

On toys (300 steps) explained variance is 0.559, without the gentle start 0.574, the parent's 0.544:
the layer norm gains it, the gentle start costs some of it in so short a run.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.40, the baseline's 0.40: no
difference that matters; explained variance is 0.458, the baseline's 0.616: worse. On a real model
(5 seeds) explained variance is 0.726, the baseline's 0.782: worse.
"""
from sae import choice
from variants.adaptive_ortho_r7 import Variant as Base
from variants.layernorm import Variant as LayerNorm


class Variant(LayerNorm, Base):
    gentle_warmup = 0.4       # fraction of the run over which both come up; 0: they don't start low
    gentle_losses = choice("ortho", "all")
    gentle_lr = 0.1           # the learning rate starts at this part of itself
    off = {"layernorm_strength": 0.0, "gentle_warmup": 0.0}

    def penalty_scale(self, name):
        gentle = name == "ortsae" or self.gentle_losses == "all"
        return super().penalty_scale(name) * (self.ramp(self.gentle_warmup) if gentle else 1.0)

    def lr_scale(self):
        part = self.gentle_lr + (1 - self.gentle_lr) * self.ramp(self.gentle_warmup)
        return part * super().lr_scale()
