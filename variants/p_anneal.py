"""p_anneal = baseline + the penalty is sum_i acts_i^p, p annealed from 1 to 0.2 (Karvonen 2024).

L1 taxes a strong act as much as ten weak ones. The smaller p, the nearer the penalty is to a count
of the latents that fire, which shrinks strong acts less. Annealed, because a small p from the start
freezes whatever fires first.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.32, the baseline's 0.40: can't
be told from it; explained variance is 0.653, the baseline's 0.616: better. On a real model (3
seeds) explained variance is 0.788, the baseline's 0.782: no difference that matters.
"""
from sae import SAE, choice


class Variant(SAE):
    activation = choice("relu")   # the penalty is on relu's acts
    p_anneal_end = 0.2            # p at the end; 1 is the baseline
    p_anneal_until = 0.8          # fraction of the run by which p gets there, linearly
    p_anneal_eps = 0.01           # added to acts, because the slope of acts^p is infinite at 0
    off = {"p_anneal_end": 1.0}
    counts = ("p",)

    def sparsity(self, out):
        p = 1 + (self.p_anneal_end - 1) * self.ramp(self.p_anneal_until)
        self.stats["p"] = p
        if p == 1:
            return super().sparsity(out)
        eps = self.p_anneal_eps
        return ((out.acts + eps) ** p - eps ** p).sum(-1).mean() / self.d_in ** 0.5
