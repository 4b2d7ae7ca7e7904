"""zscore_r1 = revive + latents fire z sigma above their mean; those that overlap part (z-score).

    acts_i = pre_i if pre_i > max(0, mean_i + z std_i), else 0; moving averages of pre_i
    interference = mean over latents i of the sum over j of relu(o_ij - tau) cos(d_i, d_j)^2

One z for all holds L0. All latents fire about equally often (by Cantelli none on more than 1 / (1 +
z^2) of the rows) and hardly any dies, but real features are not equally frequent. The cut has no
gradient, acts have one. The note's z is zscore_start=2 zscore_gain=0, and alone fixes L0.

o_ij is by interference_rule
    decoder       cos(d_i, d_j)
    coactivation  cosine of the latents' acts, a moving average
    product       the note's: mean of acts_i acts_j, here over the mean of acts_i^2 of all latents
The last two are moving averages. They punish firing together, as hierarchical features must, and so
push towards absorption.
Silent latents restart if they overlap with living ones (idle on the default data: none is silent).

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.52, the baseline's 0.40: can't
be told from it; explained variance is 0.558, the baseline's 0.616: worse. On a real model (5 seeds)
explained variance is 0.774, the baseline's 0.782: no difference that matters.
"""
from statistics import NormalDist

import torch

from sae import ReLU, above, choice
from variants.revive import Variant as Base


class ZScore(ReLU):
    """acts = pre above max(0, mean + z std) of the latent's own pre-activations."""

    steered = False           # z holds L0, no penalty does

    def __init__(self, sae):
        super().__init__(sae)
        start = NormalDist().inv_cdf(1 - sae.wanted_l0() / sae.d_sae)
        sae.register_buffer("z", torch.tensor(sae.zscore_start or start))
        sae.track("pre_mean", fresh=0.0, memory=sae.zscore_memory)
        sae.track("pre_std", fresh=1.0, memory=sae.zscore_memory)      # about a unit direction's

    def cut(self):
        return (self.sae.pre_mean + self.sae.z * self.sae.pre_std).clamp_min(0)

    def measure(self, pre):
        """Move the latents' mean and std towards those of pre [B, d_sae]; at step 0 all the way."""
        std, mean = torch.std_mean(pre.float(), 0, correction=0)
        self.sae.follow("pre_mean", mean)
        self.sae.follow("pre_std", std)

    def start(self, pre, rank):
        super().start(pre, rank)
        self.measure(pre + self.sae.b_enc)                 # it was 0 in pre

    def rescale(self, factor):
        self.sae.pre_mean.mul_(factor)
        self.sae.pre_std.mul_(factor)

    def select(self, pre):
        return above(pre, self.cut())

    def fire(self, pre, latents):
        return pre * (pre > self.cut()[latents])

    def after_step(self, out):
        sae = self.sae
        self.measure(out.pre)
        error = (sae.firing(out.acts).sum().clamp_min(1e-3) / sae.wanted_l0()).log()
        slope = 1 + sae.z.abs()                            # of the log of a normal's tail, about
        sae.z += sae.zscore_gain * error.clamp(-1, 1) / slope
        sae.stats["z"] = sae.z


class Variant(Base):
    activation = choice("relu")     # the threshold takes its place
    zscore_threshold = True         # False: a ReLU under an L1 penalty
    zscore_start = 0.0              # z at first; 0: where a normal's tail gives l0
    zscore_gain = 0.8               # share of an error of log L0 that z takes off in a step
    zscore_memory = 0.02            # fraction of the run that mean and std are averaged over
    interference_weight = 0.1
    interference_tau = 0.1          # an overlap that costs nothing
    interference_rule = choice("decoder", "coactivation", "product")
    interference_among = 2048       # a step sees the pairs of at most so many latents: drawn anew,
                                    # or the first ones if a moving average has to know them
    interference_rank = 32          # `captured`: share of the acts' covariance in these directions
    revive_interference = 1.0       # a silent latent restarts if it overlaps the living so many
                                    # times as much as they do each other; 0: any
    off = {"zscore_threshold": False, "interference_weight": 0.0, "revive_interference": 0.0}
    fixed = dict.fromkeys(["sparsity_weight", "sparsity_gain", "sparsity_memory"],
                          "z holds L0; without zscore_threshold it keeps its default")
    counts = ("z", "overlaps", "revived")

    def build(self):
        super().build()
        if self.zscore_threshold:
            self.sparsifier = ZScore(self)
        if self.interference_rule != "decoder":
            n = min(self.d_sae, self.interference_among)
            self.register_buffer("together", torch.zeros(n, n))        # of firing_together()

    def penalties(self, out):
        return super().penalties(out) | {"interference": self.interference(out)}

    def interference(self, out):
        """The penalty before its weight, estimated from the latents that are looked at."""
        if self.interference_rule == "decoder":
            g = self.generator("pairs")
            which = torch.randperm(self.d_sae, generator=g, device=g.device)
            rows = self.W_dec.index_select(0, which[:self.interference_among])
            overlap = cos = rows @ rows.T
        else:
            rows = self.W_dec[:len(self.together)]
            cos, now = rows @ rows.T, self.firing_together(out.acts)
            overlap = now + (self.together - now).detach()     # the average, with a gradient
        share = len(rows) / self.d_sae
        above_tau = (overlap.detach() > self.interference_tau).tril(-1).sum()
        self.stats["overlaps"] = 2 * above_tau / len(rows) / share     # of a latent with others
        return 2 * self.pair_cost(overlap, cos).tril(-1).sum() / len(rows) / share

    def pair_cost(self, overlap, cos):
        return (overlap - self.interference_tau).relu() * cos.square()

    def firing_together(self, acts):
        """How much the first latents fire together in acts [B, d_sae] [n, n]."""
        first = torch.arange(len(self.together), device=acts.device)
        if self.interference_rule == "coactivation":
            return self.column_cosines(acts, first)
        columns = acts.index_select(1, first).float()
        product = columns.T @ columns
        return product / product.detach().diagonal().mean().clamp_min(1e-12)

    def to_revive(self):
        silent = super().to_revive()
        living = self.W_dec[~silent]
        usual = self.cost_with(living, living[:self.interference_among]).mean()
        usual -= 1 - self.interference_tau                 # each one's with itself
        which = silent.nonzero().flatten()
        near = self.cost_with(living, self.W_dec[which]) >= self.revive_interference * usual
        return torch.zeros_like(silent).index_fill(0, which[near], True)

    def cost_with(self, living, rows):
        """What each of `rows` [n, d_in] costs in pairs with the rows `living` [m, d_in] [n]."""
        cosines = (part @ living.T for part in rows.split(1024))
        return torch.cat([self.pair_cost(cos, cos).sum(1) for cos in cosines])

    def reset_latents(self, opt, which, directions, x, encoder=1.0):
        super().reset_latents(opt, which, directions, x, encoder)
        if self.zscore_threshold:                          # to fire at the wanted rate
            std, mean = torch.std_mean(self.pre_acts(x)[:, which].float(), 0, correction=0)
            self.pre_mean[which], self.pre_std[which] = mean, std

    def after_step(self, opt, out):
        if self.interference_rule != "decoder":
            self.together.lerp_(self.firing_together(out.acts), self.memory(self.zscore_memory))
        if self.due(0.02):
            self.stats["captured"] = self.captured(out.acts.float())
        super().after_step(opt, out)

    def captured(self, acts):
        """Share of the covariance of acts [B, d_sae] in its first interference_rank directions."""
        rank, acts, g = self.interference_rank, acts - acts.mean(0), self.generator("captured")
        near = torch.randn(acts.shape[1], min(2 * rank, *acts.shape), generator=g, device=g.device)
        for _ in range(3):                                 # Halko 2011; torch's draws globally
            near = torch.linalg.qr(acts.T @ torch.linalg.qr(acts @ near).Q).Q
        strengths = torch.linalg.svdvals(acts @ near)[:rank]
        return strengths.square().sum() / acts.square().sum().clamp_min(1e-12)

    def saelens_weights(self):
        """A JumpReLU in SAELens' words."""
        architecture, weights = super().saelens_weights()
        if not self.zscore_threshold:
            return architecture, weights
        return "jumprelu", weights | {"threshold": self.sparsifier.cut() / self.scale}
