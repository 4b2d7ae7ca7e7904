"""fixed_ortho = baseline + all pairs of latents are pushed towards orthogonality, at one weight.

    fixed_ortho = d_in * mean over pairs i != j of cos(d_i, d_j)^2       (1 for a random dictionary)

The plain form of the idea, with which adaptive orthogonality is compared. Without the factor d_in
the mean is about 1 / d_in and acts on nothing. More latents than dimensions can't all be
orthogonal: the penalty stays above (d_sae - d_in) / (d_sae - 1) (Welch).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.32, the baseline's 0.40: can't
be told from it; explained variance is 0.630, the baseline's 0.616: better. On a real model (3
seeds) explained variance is 0.776, the baseline's 0.782: no difference that matters.
"""
from sae import SAE


class Variant(SAE):
    fixed_ortho_weight = 0.1
    off = {"fixed_ortho_weight": 0.0}

    def penalties(self, out):
        return super().penalties(out) | {"fixed_ortho": self.ortho()}

    def ortho(self):
        """The penalty. The squares of all d_sae^2 cosines sum to those of W_dec^T W_dec."""
        selves = self.W_dec.square().sum(-1).square().sum()
        pairs = (self.W_dec.T @ self.W_dec).square().sum() - selves
        return self.d_in * pairs / (self.d_sae * (self.d_sae - 1))
