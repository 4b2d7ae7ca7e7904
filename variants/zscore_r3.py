"""zscore_r3 = zscore_r2 + a lower penalty, a learning rate that halves on a plateau (plateau lr).

Plateau: the loss, a moving average, has not fallen by plateau_gain for plateau_patience of the run.

Found (default job, seed 0): the rate is halved three times, from three quarters of the run on. At
plateau_gain=0.01 no plateau comes in 479 steps: so short a run has none. On known features none
comes either, so the figures on them are those of the lower penalty alone.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.65, the baseline's 0.40: worse;
explained variance is 0.767, the baseline's 0.616: better. On a real model (5 seeds) explained
variance is 0.816, the baseline's 0.782: better.
"""
import torch

from variants.zscore_r2 import Variant as Base


class Variant(Base):
    interference_weight = 0.03
    plateau_factor = 0.5      # on the learning rate, at each plateau
    plateau_patience = 0.1
    plateau_gain = 0.05
    off = {"interference_weight": 0.1, "plateau_factor": 1.0}
    counts = ("plateau_lr",)  # factor on the learning rate now

    def build(self):
        super().build()
        self.register_buffer("plateau_lr", torch.ones(()))
        self.register_buffer("plateau_loss", torch.zeros(()))            # moving average
        self.register_buffer("plateau_best", torch.tensor(torch.inf))    # when it last fell enough
        self.register_buffer("plateau_since", torch.zeros(()))           # steps since then

    def lr_scale(self):
        return super().lr_scale() * float(self.plateau_lr)

    def accept(self, loss):
        accepted = super().accept(loss)
        if accepted:
            self.plateau_loss.lerp_(loss.float(), self.memory(0.02))
            self.plateau_since += 1
            if self.plateau_loss < (1 - self.plateau_gain) * self.plateau_best:
                self.plateau_best.copy_(self.plateau_loss)
                self.plateau_since.zero_()
            if self.plateau_since >= max(1, self.plateau_patience * self.steps):
                self.plateau_lr *= self.plateau_factor
                self.plateau_since.zero_()
        self.stats["plateau_lr"] = self.plateau_lr
        return accepted
