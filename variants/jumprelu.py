"""jumprelu = baseline with the JumpReLU activation: learned thresholds, L0 driven to its target (Rajamanoharan 2024b)."""
from sae import SAE


class Variant(SAE):
    activation = "jumprelu"
    off = {"activation": "relu"}
