"""zscore_r8 = zscore_r7 + the latents that fire in a row attend to each other, which weighs them anew (attention).

    acts_i becomes acts_i * (1 + s tanh(context . read_i)), context = sum_j softmax_j(query . key_j) value_j over what fires in the row

One query a row, the mean over what fires: linear in the latents that fire. |s| < 1, so exactly the same latents fire, at other strengths.
The residual is acts; s starts at 0. What a latent means then depends on its company, which a probe can't see.

Found on toy data, 3 seeds: s ends at +-0.6, the factors spread by 0.14 about 1 (from
0.6 to 1.55); explained variance 0.802 against 0.799.
Costs: time 3.4, memory 1.17 of the base's.
"""
import torch
from torch import nn

from sae import generator
from variants.zscore_r7 import Variant as Base


class Variant(Base):
    attend = True             # False: acts as they are
    attend_width = 16         # of queries, keys and values
    off = {"attend": False}

    def build(self):
        super().build()
        if self.attend:
            for name in ("W_query", "W_key", "W_value", "W_read"):
                w = torch.randn(self.d_sae, self.attend_width, generator=generator(self.seed, name))
                setattr(self, name, nn.Parameter(w / self.attend_width ** 0.5))
                self.latents[name] = (0, None)
            self.attend_scale = nn.Parameter(torch.zeros(()))               # s = tanh of it

    def activate(self, pre):
        """acts * (1 + s tanh(what the row's attention says)): the residual is acts, and exactly the same latents fire."""
        acts = super().activate(pre)
        if not self.attend:
            return acts
        at = (acts.detach() > 0).flatten().nonzero().flatten()             # the places that fire; below, one row for each of them
        row, latent, s = at // self.d_sae, at % self.d_sae, self.attend_scale.tanh()
        mine = lambda weight: weight.index_select(0, latent)
        total = lambda v: torch.zeros(len(acts), v.shape[1], dtype=v.dtype, device=v.device).index_add(0, row, v).index_select(0, row)
        f = acts.flatten().index_select(0, at)[:, None].float()
        query = total(f * mine(self.W_query)) / total(f)                    # one for the row: the mean of what fires in it
        score = (query * mine(self.W_key)).sum(-1)
        highest = score.new_zeros(len(acts)).scatter_reduce(0, row, score.detach(), "amax", include_self=False).index_select(0, row)
        weight = (score - highest).exp()[:, None]                           # with the division below, a softmax over what fires
        context = total(weight * mine(self.W_value)) / total(weight)
        gain = 1 + s * (context * mine(self.W_read)).sum(-1, keepdim=True).tanh()
        self.stats |= {"attend_scale": s.detach(), "attend_spread": gain.detach().std()}
        return torch.zeros_like(acts).flatten().scatter(0, at, (f * gain).flatten().to(acts.dtype)).view_as(acts)
