"""topk_ortho_r8 = topk_ortho_r7 + neighbours fire together (adaptive neighbourhoods).

    nearness of i and j = cosine of their acts, from mean products over neighbours_memory of the run

Each latent's nearest are its neighbours: inhibition_radius of them on average, more the more it
fires with others, at most twice as many; none before the first count. A latent that restarts has
those of the latent that it was until others are counted. Only the latents that fire most are
counted. A pass over these for each of the 64 neighbours makes it the study's slowest row.

On known features (tests/bench/STUDIES.md, 5 seeds) absorption is 0.57, the baseline's 0.40: worse;
explained variance is 0.464, the baseline's 0.616: worse. On a real model (5 seeds) explained
variance is 0.756, the baseline's 0.782: worse.
"""
import torch

from variants.topk_ortho_r7 import Variant as Base


class Variant(Base):
    neighbours_every = 0.02       # fraction of the run between two choices; 0: neighbours in index
    neighbours_latents = 2048     # at most so many latents have neighbours
    neighbours_memory = 0.02
    off = {"neighbours_every": 0.0}
    counts = ("neighbours",)      # a latent's, on average

    def build(self):
        super().build()
        counted = torch.arange(min(self.neighbours_latents, self.d_sae))
        n = len(counted)
        self.register_buffer("counted", counted)
        self.register_buffer("together", torch.zeros(n, n))            # mean products of their acts
        most = min(2 * self.inhibition_radius, n - 1)
        # a latent, then its neighbours; itself where it has fewer
        self.register_buffer("neighbours", counted[:, None].repeat(1, 1 + most))

    def winners(self, pre):
        if not self.neighbours_every:
            return super().winners(pre)
        latents, *others = self.neighbours.T
        winner = pre.index_select(1, latents)
        for neighbour in others:
            winner = winner.maximum(pre.index_select(1, neighbour))
        return pre.index_copy(1, latents, winner)

    def after_step(self, opt, out):
        super().after_step(opt, out)
        acts = out.acts.index_select(1, self.counted).float()
        self.together.lerp_(acts.T @ acts / len(acts), self.memory(self.neighbours_memory))
        if self.due(self.neighbours_every):
            self.choose_neighbours()
            if len(self.counted) < self.d_sae:             # count those that fire most now
                self.counted.copy_(self.rate.topk(len(self.counted)).indices)
                self.together.zero_()

    def choose_neighbours(self):
        size = self.together.diagonal().sqrt().clamp_min(1e-12)
        near = (self.together / size / size[:, None]).fill_diagonal_(0)
        gregarious = near.mean(1)
        wanted = (self.inhibition_radius * gregarious / gregarious.mean().clamp_min(1e-12)).round()
        best = near.topk(self.neighbours.shape[1] - 1)
        place = torch.arange(best.indices.shape[1], device=near.device)
        used = (place < wanted[:, None]) & (best.values > 0)
        self.neighbours[:, 0] = self.counted
        self.neighbours[:, 1:] = self.counted[best.indices].where(used, self.counted[:, None])
        self.stats["neighbours"] = used.sum(1).float().mean()
