"""adaptive_ortho_r10 = adaptive_ortho_r9 + k winners take all, each latent on its own scale (kwta).

    acts = the l0 latents of a row with the highest relu(pre_i) / (usual size of pre_i) ^ kwta_norm

A latent competes by how high it is for itself, so that a few large latents don't win everywhere.

On toys (300 steps) the rates' standard deviation over their mean is 0.25, with kwta_norm=0 0.49,
for an explained variance of 0.685, with kwta_norm=0 0.690.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.60, the baseline's 0.40: worse;
explained variance is 0.662, the baseline's 0.616: better. On a real model (3 seeds) explained
variance is 0.787, the baseline's 0.782: no difference that matters.
"""
import torch

from sae import Refuse
from variants.adaptive_ortho_r9 import Variant as Base


class Variant(Base):
    activation = "topk"       # l0 is k
    kwta_norm = 1.0           # 0: the highest pre win, as with topk
    off = {"activation": "relu", "kwta_norm": 0.0}
    counts = ("upsets",)      # share of the winners that topk would not have chosen

    def build(self):
        if self.kwta_norm and self.activation != "topk":
            raise Refuse(f"--set activation={self.activation}: want topk, or kwta_norm=0", 2)
        super().build()
        self.track("usual_pre", fresh=1.0, start=1.0)      # mean square of a latent's pre

    def activate(self, pre):
        if not self.kwta_norm:
            return super().activate(pre)
        pre = pre.relu()
        height = pre / self.usual_pre ** (self.kwta_norm / 2)
        winners = height.topk(round(self.wanted_l0())).indices
        return torch.zeros_like(pre).scatter(-1, winners, pre.gather(-1, winners))

    def after_step(self, opt, out):
        square = out.pre.float().square().mean(0)
        locked = self.unlocked == 0                        # its pre is 0, which is no size
        self.follow("usual_pre", torch.where(locked, self.usual_pre, square))
        if self.kwta_norm and self.due(0.02):
            least = out.pre.topk(round(self.wanted_l0())).values[:, -1:]
            self.stats["upsets"] = (out.pre < least)[out.acts > 0].float().mean()
        super().after_step(opt, out)
