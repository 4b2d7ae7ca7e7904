"""hierarchical_r2 = revive + hierarchical_r1: silent latents restart from badly reconstructed rows (resampling, Bricken 2023).

A schedule that starts sparse starves latents before their time comes; those that were silent for a tenth of the run start anew every
fifth of it, optimizer moments cleared.

Found on toy data whose second half of latents starts silent (300 steps, 6 seeds): dead at the end none instead of half; explained
variance 0.549 against 0.537 (ReLU; seed by seed 0.000 to 0.020 more), 0.796 against 0.734 (BatchTopK). Where nothing falls silent it
changes nothing.
Costs: time 1.0, memory 0.98 of the base's.
"""
from variants.hierarchical_r1 import Variant as Base
from variants.revive import Variant as Revive


class Variant(Revive, Base):
    off = {"revive_every": 0.0}
    toy = {"revive_every": 0.45}     # as in revive all restart once, but after the schedule's end and with time to find their L0 again
