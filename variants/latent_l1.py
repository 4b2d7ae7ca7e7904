"""latent_l1 = baseline + a sparsity weight per latent, higher the more often it fires.

    sparsity = mean over rows of  sum_i w_i acts_i / sqrt(d_in)
    w_i = (rate_i / mean rate) ^ latent_l1_power

Why: under one weight for all a few latents do most of the firing. Here the work is shared, at the
same L0. JumpReLU counts latents instead of acts. TopK kinds have no sparsity penalty; there
`latent_l1` is the same sum with w_i less the mean weight: the frequent latents pay the rare ones
for their acts.
"""
from sae import SAE, Step


class Variant(SAE):
    latent_l1_power = 0.5
    latent_l1_weight = 0.03   # topk, batch_topk: of the term `latent_l1`
    off = {"latent_l1_power": 0.0}
    counts = ("latent_l1_spread",)        # standard deviation of the weights

    def l1_weights(self):
        """Each latent's factor on what its acts cost [d_sae]."""
        return ((self.rate + 1e-6) / (self.rate.mean() + 1e-6)) ** self.latent_l1_power

    def cost(self, out, weights):
        """What each row pays if latent i costs weights[i] [B]."""
        if self.activation == "jumprelu":
            return Step.apply(out.pre, self.log_threshold.exp(), self.bandwidth) @ weights / self.l0
        return self.row_sums(out.acts, weights) / self.d_in ** 0.5

    def sparsity(self, out):
        return self.cost(out, self.l1_weights()).mean()

    def penalties(self, out):
        found, weights = super().penalties(out), self.l1_weights()
        self.stats["latent_l1_spread"] = weights.std()
        if not self.sparsifier.steered:
            found["latent_l1"] = self.cost(out, weights - weights.mean()).mean()
        return found
