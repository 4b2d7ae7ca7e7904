"""latent_lr = baseline + each latent has its own learning rate, higher the rarer it fires.

    weights after the step = weights before + factor * Adam's move
    factor = (mean rate / own rate) ^ latent_lr_power, within latent_lr_low .. latent_lr_high

for a latent's encoder column, decoder row and bias. Scaling its gradient would do nothing: Adam
divides the scale out again.
"""
from sae import SAE


class Variant(SAE):
    latent_lr_low = 0.1       # bounds of a latent's factor on the learning rate
    latent_lr_high = 10.0
    latent_lr_power = 0.5
    off = {"latent_lr_low": 1.0, "latent_lr_high": 1.0}
    counts = ("latent_lr_spread",)        # standard deviation of the factors' logarithms

    def move_scale(self):
        """Each latent's factor on its move [d_sae], before the bounds."""
        return ((self.rate.mean() + 1e-6) / (self.rate + 1e-6)) ** self.latent_lr_power

    def before_step(self, opt):
        super().before_step(opt)
        self.old = [W.detach().clone() for W in (self.W_enc, self.W_dec, self.b_enc)]

    def after_step(self, opt, out):
        factor = self.move_scale().clamp(self.latent_lr_low, self.latent_lr_high)
        W_enc, W_dec, b_enc = self.old
        self.W_enc.copy_(W_enc.lerp(self.W_enc, factor))
        self.W_dec.copy_(W_dec.lerp(self.W_dec, factor[:, None]))
        self.b_enc.copy_(b_enc.lerp(self.b_enc, factor))
        self.old = None
        self.stats["latent_lr_spread"] = factor.log().std()
        super().after_step(opt, out)
