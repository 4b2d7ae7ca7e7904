"""layernorm = baseline + each row is centred and scaled to the mean norm before the encoder, which is undone after the decoder.

Long rows no longer light more latents than short ones, and no longer rule the gradient of the encoder. The error is still that of the
row as it came; acts are in units of the normed row. Found on toys (300 steps, 3 seeds): explained variance 0.509 -> 0.558.
Costs: time 1.0, memory 1.00 of the base's.
"""
from sae import SAE


class Variant(SAE):
    layernorm_strength = 1.0      # 0: rows as they come
    off = {"layernorm_strength": 0.0}

    def init_from_data(self, x):
        shift, size = self.row_norm(x)
        super().init_from_data((x - shift) / size)

    def forward(self, x):
        shift, size = self.row_norm(x)
        out = super().forward((x - shift) / size)
        return out._replace(x=x, x_hat=out.x_hat * size + shift)

    def row_norm(self, x):
        """The shift and the size of each row that are taken out, [B, 1] each; sizes are about 1."""
        shift = self.layernorm_strength * x.mean(-1, keepdim=True)
        size = (x - shift).norm(dim=-1, keepdim=True).clamp_min(1e-6) / self.d_in ** 0.5
        return shift, size ** self.layernorm_strength
