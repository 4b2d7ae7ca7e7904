"""grad_balance = baseline + all latents move by one length (gradient balancing).

    W after the step = W before + (mean length / own length) ^ balance_strength * Adam's move

for each latent's encoder column and decoder row. Why: a latent that fires often gets large
gradients and settles early, a rare one hardly moves. Adam divides the scale of a gradient out
again, so it is the move that is balanced, inside the optimizer's step: a variant that scales
moves on purpose does so afterwards. The note's own form scales the gradients' rows, before Adam:
balance_of=gradient.
"""
import torch

from sae import SAE, choice


class Variant(SAE):
    balance_strength = 1.0    # 0: moves as they are; 1: all of the mean length
    balance_of = choice("move", "gradient")
    balance_eps = 0.1         # no move gets longer than 1 / eps times: a silent latent's is noise
    off = {"balance_strength": 0.0}
    counts = ("balance_spread",)          # longest over median move, before it is balanced

    def make_optimizer(self):
        opt = super().make_optimizer()
        if self.balance_strength and self.balance_of == "move":
            opt.register_step_pre_hook(self.keep_weights)
            opt.register_step_post_hook(self.balance_moves)
        return opt

    def keep_weights(self, *_):
        self.unmoved = self.W_enc.detach().clone(), self.W_dec.detach().clone()

    @torch.no_grad()
    def balance_moves(self, *_):
        for W, before, axis in zip((self.W_enc, self.W_dec), self.unmoved, (0, 1)):
            move = W - before
            W.copy_(before + move * self.balance_factor(move, axis))
        self.unmoved = None

    def balance_factor(self, moves, axis):
        """What brings the length along `axis` of each latent's move to the mean length."""
        length = moves.norm(dim=axis, keepdim=True)
        self.stats["balance_spread"] = length.max() / length.median().clamp_min(1e-30)
        shortest = (self.balance_eps * length.mean()).clamp_min(1e-30)
        return (length.mean() / length.clamp_min(shortest)) ** self.balance_strength

    def before_step(self, opt):
        if self.balance_strength and self.balance_of == "gradient":
            self.W_enc.grad *= self.balance_factor(self.W_enc.grad, 0)
            self.W_dec.grad *= self.balance_factor(self.W_dec.grad, 1)
        super().before_step(opt)
