"""zscore_r2 = zscore_r1 + a start made for the z-score threshold, and the penalty comes up from 0 (initialisation).

The base starts a ReLU with biases at which every latent just fires, so that acts start near 0. The threshold needs no bias to be sparse:
from biases of 0 a latent that fires starts well above 0, and the encoder is scaled to that. Unit decoder rows, the encoder their
transpose and the data's mean in b_dec are the base's already.

Found on toy data, 3 seeds: explained variance after 10 % of the run 0.49 against 0.40, at its end 0.73 against 0.62.
Costs: time 2.6, memory 1.09 of the base's.
"""
import torch

from variants.zscore_r1 import Variant as Base


class Variant(Base):
    zscore_init = True              # biases start at 0 and the encoder is fitted to what fires then
    interference_warmup = 0.2       # the penalty's weight comes up from 0 over this fraction of the run
    off = {"zscore_init": False, "interference_warmup": 0.0}

    @torch.no_grad()
    def init_from_data(self, x):
        super().init_from_data(x)
        if self.zscore_init and self.zscore_threshold:
            self.b_enc.zero_()
            self.measure(self.pre_acts(x), 1.0)
            read = self(x).x_hat - self.b_dec
            factor = ((x - self.b_dec) * read).sum() / read.pow(2).sum().clamp_min(1e-12)
            for tensor in (self.W_enc, self.pre_mean, self.pre_std):
                tensor.mul_(factor)

    def interference(self, out):
        up = min(1.0, self.progress / self.interference_warmup) if self.interference_warmup else 1.0
        return up * super().interference(out)
