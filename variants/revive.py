"""revive = baseline + silent latents restart where the reconstruction is worst (Bricken 2023).

A latent that never fires gets a gradient from AuxK alone. Every revive_every of the run those that
were silent for revive_silent of it restart in the directions of this batch's residuals, of rows
drawn by the square of their squared error as in Bricken, at most one a row. With relu and jumprelu
they fire at the wanted rate from the start. Their encoder has the others' mean norm (Bricken's 0.2
of it does not grow in a short run).

Idle on the default data: nothing dies.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.40, the baseline's 0.40: no
difference that matters; explained variance is 0.616, the baseline's 0.616: no difference that
matters. On a real model (5 seeds) explained variance is 0.782, the baseline's 0.782: no difference
that matters.
"""
import torch

from sae import SAE, choice


class Variant(SAE):
    revive_every = 0.2        # fraction of the run; never in its last fifth: no time to learn
    revive_silent = 0.1       # a latent is revived if it was silent for this fraction of the run
    revive_from = choice("error", "random")       # residuals of badly reconstructed rows, or random
    off = {"revive_every": 0.0}
    counts = totals = ("revived",)

    def to_revive(self):
        """Mask [d_sae] of the latents to restart now."""
        return self.silent >= self.revive_silent * self.steps

    def restart(self, out):
        which, directions = super().restart(out)
        if self.due(self.revive_every) and self.progress < 0.8:
            dead = self.to_revive()
            dead[which] = False                                # these restart anyway
            revived = dead.nonzero().flatten()[:len(out.x)]
            which = torch.cat([which, revived])
            directions = torch.cat([directions, self.revival_directions(out, len(revived))])
            self.revived += len(revived)
        return which, directions

    def revival_directions(self, out, n):
        if self.revive_from == "random":
            g = self.generator("revive")
            return torch.randn(n, self.d_in, generator=g, device=out.x.device)
        return (out.x - out.x_hat)[self.bad_rows(out, n)]
