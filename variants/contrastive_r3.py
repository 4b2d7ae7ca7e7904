"""contrastive_r3 = latent_l1 on contrastive_r2 + L1 weights follow use, in bounds (lambda_bounds).

    lambda_i = rate_i / (2 mean rate), within low .. high
    (low, high) shrinks from (0.02, 1) to (0.01, 0.5) over the run

Why: a rare latent pays less for firing than a much used one, so that the work is shared. The
note's run itself had one weight for all that falls from 0.5 to 0.01; the controller of L0 undoes
what is common to all.

Found (toy mixture, ReLU, L0 4, 300 steps, seeds 0 and 1): Gini of the rates 0.08 and 0.10 instead
of 0.20 and 0.20, explained variance 0.533 and 0.534 instead of 0.545 and 0.538.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.61, the baseline's 0.40: worse;
explained variance is 0.544, the baseline's 0.616: worse. On a real model (5 seeds) explained
variance is 0.777, the baseline's 0.782: no difference that matters.
"""
from variants.contrastive_r2 import Variant as Base
from variants.latent_l1 import Variant as LatentL1


class Variant(LatentL1, Base):
    lambda_low = 0.02         # bounds of a latent's factor on the sparsity weight, at the start ...
    lambda_high = 1.0
    lambda_low_end = 0.01     # ... and at the end
    lambda_high_end = 0.5
    off = {"lambda_low": 1.0, "lambda_high": 1.0, "lambda_low_end": 1.0, "lambda_high_end": 1.0}
    fixed = {"latent_l1_power": "lambda is half the rate over the mean rate, within its bounds"}

    def l1_weights(self):
        low = self.lambda_low + (self.lambda_low_end - self.lambda_low) * self.progress
        high = self.lambda_high + (self.lambda_high_end - self.lambda_high) * self.progress
        return (self.rate / (2 * self.rate.mean()).clamp_min(1e-12)).clamp(low, high)
