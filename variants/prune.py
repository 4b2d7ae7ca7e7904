"""prune = baseline + of two latents with near-parallel decoders the rarer restarts.

Near-parallel: a cosine of the decoder rows above prune_threshold; antiparallel latents are no
doubles. Why: doubles waste latents and split a feature's firing. The pruned latent restarts in a
random direction that is orthogonal to the survivors nearest to it, with relu and jumprelu firing
at the wanted rate, its optimizer moments cleared. That goes on to the end of the run: in
topk_ortho_r4 on known features nine of 24 are pruned in the last fifth.
"""
import torch

from sae import SAE, unit


class Variant(SAE):
    prune_every = 0.02        # fraction of the run
    prune_threshold = 0.8
    prune_near = 8            # survivors that a fresh direction is orthogonal to
    off = {"prune_every": 0.0}
    counts = totals = ("pruned",)

    def spare(self, double):
        """The mask `double` [d_sae] of the latents to prune, without those that may not be."""
        return double

    def fresh_directions(self, survivors, n):
        """n random directions [n, d_in], each orthogonal to its nearest survivors [m, d_in]."""
        g = self.generator("prune")
        fresh = unit(torch.randn(n, self.d_in, generator=g, device=survivors.device))
        near = min(self.prune_near, self.d_in // 2, len(survivors))
        parts = []
        for part in fresh.split(1024):
            nearest = (part @ survivors.T).abs().topk(near).indices
            basis = torch.linalg.qr(survivors[nearest].mT).Q               # [n, d_in, near]
            parts.append(part - (basis @ (basis.mT @ part[..., None])).squeeze(-1))
        return torch.cat(parts)

    def restart(self, out):
        which, directions = super().restart(out)
        if self.due(self.prune_every):
            double = torch.zeros_like(self.rate, dtype=torch.bool)
            double[self.near_pairs(self.prune_threshold)[0]] = True
            double = self.spare(double)
            double[which] = False                              # these restart anyway
            fresh = self.fresh_directions(self.W_dec[~double], int(double.sum()))
            which = torch.cat([which, double.nonzero().flatten()])
            directions = torch.cat([directions, fresh])
            self.pruned += len(fresh)
        return which, directions
