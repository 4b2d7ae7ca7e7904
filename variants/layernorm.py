"""layernorm = baseline + each row is centred and scaled to one length before the encoder.

    x_hat = decode(encode((x - shift) / size)) * size + shift

shift is the mean of the row's entries, size its length over sqrt(d_in). Long rows no longer light
more latents than short ones. The error is still that of the row as it came; acts are in units of
the normed row.
"""
from sae import SAE


class Variant(SAE):
    layernorm_strength = 1.0      # 0: rows as they come
    layernorm_eps = 1e-6          # least size of a row
    off = {"layernorm_strength": 0.0}
    counts = ("row_size_spread",)

    def row_norm(self, x):
        """What is taken out of each row: (shift [B, 1], size [B, 1])."""
        shift = self.layernorm_strength * x.mean(-1, keepdim=True)
        size = (x - shift).norm(dim=-1, keepdim=True) / self.d_in ** 0.5
        return shift, size.clamp_min(self.layernorm_eps) ** self.layernorm_strength

    def normed(self, x):
        shift, size = self.row_norm(x)
        return (x - shift) / size

    def init_from_data(self, x):
        super().init_from_data(self.normed(x))

    def forward(self, x):
        shift, size = self.row_norm(x)
        self.stats["row_size_spread"] = size.detach().std(correction=0)
        out = super().forward((x - shift) / size)
        return out._replace(x=x, x_hat=out.x_hat * size + shift)

    def aux(self, out):
        """As in the base, in units of the normed row, as acts are."""
        size = self.row_norm(out.x)[1]
        return super().aux(out._replace(x=out.x / size, x_hat=out.x_hat / size))

    def reset_latents(self, opt, which, directions, x, encoder=1.0):
        """As in the base; how often a latent fires depends on normed rows."""
        super().reset_latents(opt, which, directions, self.normed(x), encoder)
