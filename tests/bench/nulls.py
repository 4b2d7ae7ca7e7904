"""How often 04_plot.py calls a difference that is not there, and finds one that is. 4 minutes.

    python tests/bench/nulls.py          10,000 experiments a cell; what RESULTS.md sums up

An experiment is a baseline and `tried` variants on the same seeds; its verdicts are made by the
functions that 04_plot.py uses. Values are in units of the explained variance, whose margin is 0.01.
A seed moves all runs by 0.003, and each run by a noise of its own:

    normal      standard deviation sd
    t3          Student's t with 3 degrees of freedom, scaled to sd: outliers
    skewed      exponential, to the left: some runs end badly. The baseline's is normal
    unequal     normal; the variants' standard deviations lie between sd / 3 and 3 sd
"""
import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
plot = importlib.import_module("04_plot")

WORTH = plot.METRICS["explained_variance"].worth
SLOPE = 0.066                # explained variance per unit of log L0, on the embedded model
NOISES = ("normal", "t3", "skewed", "unequal")


def draw_noise(kind, sd, shape, rng):
    """Noise [experiments, tried, seeds] of mean 0 and standard deviation about sd."""
    if kind == "t3":
        return sd * rng.standard_t(3, shape) / 3 ** 0.5
    if kind == "skewed":
        return sd * (1 - rng.exponential(size=shape))
    if kind == "unequal":
        return sd * rng.normal(size=shape) * 3 ** rng.uniform(-1, 1, (*shape[:2], 1))
    return sd * rng.normal(size=shape)


def call_experiments(tried, seeds, kind="normal", sd=0.001, gap=0.0, effect=0.0, n=10_000,
                     paired=True):
    """Verdicts [n, tried] in words; the first variant has the true difference `effect`.

    gap: how much higher every variant's L0 is than the baseline's, within what may be compared.
    """
    key = [tried, seeds, NOISES.index(kind), round(1e6 * sd), round(100 * gap)]
    rng = np.random.default_rng(key)
    seed_effect = 0.003 * rng.normal(size=(n, 1, seeds))
    own = "normal" if kind in ("skewed", "unequal") else kind
    baseline = seed_effect + draw_noise(own, sd, (n, 1, seeds), rng)
    values = seed_effect + draw_noise(kind, sd, (n, tried, seeds), rng) + SLOPE * np.log(1 + gap)
    values[:, 0] += effect
    baseline = np.broadcast_to(baseline, values.shape)
    mean, low, high, p = plot.mean_difference(values, baseline, paired)
    return plot.call(mean, low, high, plot.holm(p), WORTH)


def false_calls(*args, **more):
    """Share of experiments without a difference that have a better or worse."""
    words = call_experiments(*args, **more)
    return np.isin(words, ["better", "worse"]).any(-1).mean()


def power(tried, seeds, **more):
    """Share of experiments in which a difference of twice the margin is called better."""
    return (call_experiments(tried, seeds, effect=2 * WORTH, **more)[:, 0] == "better").mean()


TRIED, SEEDS = (1, 9, 43), (3, 5, 8)


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    columns = [f"{v} tried, {s} seeds" for v in TRIED for s in SEEDS]
    print("False better or worse, %; the highest over L0 gaps of 0, 2 and 4 %\n")
    print_row("noise", "sd / margin", *columns)
    print_row(*["---"] * 11)
    for kind in NOISES:
        for sd in (0.001, 0.003, 0.01, 0.03):
            shares = [max(false_calls(v, s, kind, sd, gap) for gap in (0, 0.02, 0.04))
                      for v in TRIED for s in SEEDS]
            print_row(kind, f"{sd / WORTH:g}", *(f"{100 * share:.1f}" for share in shares))
    print("\nA true difference of twice the margin is called better, %, normal noise\n")
    print_row("sd / margin", *columns)
    print_row(*["---"] * 10)
    for sd in (0.0005, 0.001, 0.002, 0.005, 0.01):
        shares = [power(v, s, sd=sd) for v in TRIED for s in SEEDS]
        print_row(f"{sd / WORTH:g}", *(f"{100 * share:.0f}" for share in shares))


if __name__ == "__main__":
    main()
