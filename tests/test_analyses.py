"""Promises of stage 3's geometry and stability: planted ones give the numbers of theory."""
import math

import pytest
import torch
from evaluation import build, eval_py, evaluate, truth_cache, write_run
from toys import orthonormal

from sae import SAE, Acts, generator, unit, write_json


def rows(n, d, key="rows"):
    return torch.randn(n, d, generator=generator(key, n, d))


def directions(W, **kwargs):
    return eval_py.decoder_geometry(W, **kwargs)


# ---- decoder rows --------------------------------------------------------------------------------


def test_duplicated_and_opposite_latents_are_seen():
    W = orthonormal(8)
    m = directions(torch.cat([W, W[:4]]), block=5)
    assert m["coherence"] == pytest.approx(1)
    assert m["mean_max_cosine"] == pytest.approx(8 / 12)
    m = directions(torch.cat([W, -W[:4]]))
    assert m["coherence"] == pytest.approx(1) and m["mean_max_cosine"] == pytest.approx(0, abs=1e-6)


def test_blocks_give_what_all_pairs_at_once_give():
    W = unit(rows(100, 16))
    cosine = W @ W.T
    others = cosine[~torch.eye(100, dtype=torch.bool)]
    m = directions(W, block=7)
    assert m["mean_abs_cosine"] == pytest.approx(others.abs().mean().item(), rel=1e-5)
    assert m["coherence"] == pytest.approx(others.abs().max().item())
    highest = cosine.fill_diagonal_(-2).amax(1)
    assert m["mean_max_cosine"] == pytest.approx(highest.mean().item(), abs=1e-6)
    assert directions(W[:1])["mean_max_cosine"] == 0


def test_the_effective_rank_is_that_of_the_subspace():
    assert 4.5 < directions(unit(rows(400, 5)) @ orthonormal(5))["effective_rank"] <= 5 + 1e-6


def test_projection_errors_fall_as_one_over_root_k_and_all_is_kept_from_d_on():
    found = eval_py.projections(unit(rows(300, 256)))
    k = torch.tensor(eval_py.JL_DIMENSIONS[:3], dtype=torch.double)
    theory = ((1 - k / 256) / k).sqrt()          # of orthonormal axes, for cosines near 0
    assert found["error_sd"][:3] == pytest.approx(theory.tolist(), rel=0.1)
    assert max(found["error_sd"][3:]) < 1e-5 and found["recall"][3:] == [1.0, 1.0]
    assert found["recall"][0] < found["recall"][1] < found["recall"][2] < 1


def test_condition_numbers_of_orthonormal_near_duplicate_and_dependent_sets():
    def median(W, *sets):
        return eval_py.condition_number(W, [torch.tensor(s) for s in sets])

    W, angle = orthonormal(8), 0.01
    assert median(W, [0, 1, 2], [3, 4, 5]) == pytest.approx(1, abs=1e-6)
    near = torch.stack([W[0], math.cos(angle) * W[0] + math.sin(angle) * W[1]])
    expected = math.sqrt((1 + math.cos(angle)) / (1 - math.cos(angle)))
    assert median(near, [0, 1]) == pytest.approx(expected, rel=1e-3)
    assert median(torch.cat([W, near]), [0, 1], [0, 1], [8, 9]) == pytest.approx(1, abs=1e-6)
    assert median(torch.cat([W, W]), [0, 8]) is None                  # the same twice
    assert median(unit(rows(20, 4)), list(range(5))) is None          # more rows than dimensions
    assert median(W) is None


def test_random_directions_have_the_condition_number_of_marchenko_and_pastur():
    W = eval_py.random_directions(4000, 512)
    sets = [torch.randperm(4000, generator=generator(i))[:64] for i in range(20)]
    root = math.sqrt(64 / 512)
    found = eval_py.condition_number(W, sets)
    assert found == pytest.approx((1 + root) / (1 - root), rel=0.06)


# ---- what fires ----------------------------------------------------------------------------------


class Plain(SAE):
    """Reads rows of zeros and ones as they are."""
    def pre_acts(self, x):
        return x

    def decode(self, acts):
        return acts


def code_of(on):
    """Code of latents that fire as `on` [n, 16] says."""
    return eval_py.encode_sample(Plain(16, 10, 0, d_sae=16, l0=1.0).eval(), on.float())


def test_latents_that_fire_together_correlate_and_shifted_ones_do_not():
    together = torch.rand(4000, 2, generator=generator("groups")) < 0.25
    code = code_of(together.repeat_interleave(8, 1))             # two groups of eight that are one
    assert eval_py.mean_correlation(code.acts) == pytest.approx(7 / 15, abs=0.03)
    assert eval_py.mean_correlation(eval_py.shift_columns(code.acts)) < 0.05
    assert all(len(group) == 16 for group in eval_py.cofiring_groups(code))      # all there are


def test_groups_are_the_latents_that_correlate_most(monkeypatch):
    monkeypatch.setattr(eval_py, "GROUP", 4)
    together = torch.rand(4000, 4, generator=generator("groups")) < 0.25
    groups = eval_py.cofiring_groups(code_of(together.repeat_interleave(4, 1)))
    assert all(len({latent // 4 for latent in group.tolist()}) == 1 for group in groups)


def test_sparsity_of_known_codes():
    def sparsity(on):
        code = code_of(on)
        return eval_py.sparsity(code) | {"l0": set(code.l0.tolist()), "latents": len(code.latents)}

    one, all_, single = torch.eye(16).repeat(10, 1), torch.ones(50, 16), torch.zeros(50, 16)
    single[:, 3] = 1
    found = sparsity(one)
    assert found["hoyer"] == pytest.approx(1) and found["gini"] == pytest.approx(0, abs=1e-6)
    assert found["l0"] == {1} and found["latents"] == 16
    assert sparsity(all_)["hoyer"] == pytest.approx(0, abs=1e-6) and sparsity(all_)["l0"] == {16}
    assert sparsity(single)["gini"] == pytest.approx(15 / 16)
    silent = code_of(torch.zeros(50, 16))
    assert eval_py.sparsity(silent) == {"hoyer": None, "gini": None} and silent.active == []
    assert eval_py.cofiring_groups(silent) == [] and eval_py.pair_stability(silent) is None


def test_pairs_that_fire_together_are_chosen_in_every_batch_and_others_by_chance(monkeypatch):
    monkeypatch.setattr(eval_py, "TOP_PAIRS", 0.1)               # 12 of 120 pairs
    independent = torch.rand(8192, 16, generator=generator("independent")) < 0.3
    planted = independent.clone()
    planted[:, 8:] = independent[:, :8]                          # 8 pairs that are one
    stable, chance = (eval_py.pair_stability(code_of(on)) for on in (planted, independent))
    assert stable["rows"] == [256, 1024, 2048] and stable["pairs"] == 12
    assert min(stable["phi"]["jaccard"]) >= 8 / 16 and chance["phi"]["jaccard"][0] < 0.25
    assert stable["null"] == pytest.approx([0.1 / 1.9] * 3)
    code = code_of(independent)._replace(pre=planted.float())
    assert min(eval_py.pair_stability(code)["preact"]["jaccard"]) >= 8 / 16
    never = eval_py.pair_stability(code_of(torch.eye(16).repeat(512, 1)))        # fire together
    assert never["coactivation"]["jaccard"] == never["phi"]["jaccard"] == [0, 0, 0]


def test_every_latent_is_in_the_density_histogram_or_silent():
    d = eval_py.density(torch.tensor([0, 0, 1e-9, 1e-6, 0.003, 0.5, 1.0], dtype=torch.float64))
    assert d["silent"] == 2 and sum(d["counts"]) == 5 and d["counts"][0] == 2
    assert len(d["log10_edges"]) == len(d["counts"]) + 1


# ---- stability -----------------------------------------------------------------------------------


def test_a_shuffled_dictionary_is_found_again_and_a_random_one_is_not():
    W = unit(rows(64, 32))
    order = torch.randperm(64, generator=generator("order"))
    same = eval_py.compare(W, W[order])
    assert same["matched"] == same["best"] == pytest.approx(1) and same["again"] == 1
    null = eval_py.compare(W, unit(rows(64, 32, "other")))
    assert null["matched"] < null["best"] < 0.7 and null["again"] < 0.1
    assert eval_py.compare(W, -W)["matched"] < 0.7               # an opposite is another feature


def test_matching_is_one_to_one():
    W = orthonormal(4)
    crowd = torch.cat([W[:1]] * 4)                               # four times the same latent
    found = eval_py.compare(crowd, W)
    assert found["best"] == pytest.approx(1) and found["matched"] == pytest.approx(1 / 4, abs=1e-6)


# ---- from end to end -----------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path):
    truth_cache(tmp_path / "acts" / "toy")
    return Acts(tmp_path / "acts" / "toy"), tmp_path / "runs"


def test_geometry_of_a_run_stands_beside_that_of_random_directions(here):
    acts, folder = here
    run = write_run(folder / "topk-s0", build(acts, d_sae=128), acts)
    result = evaluate("geometry", acts, [run])["topk-s0"]
    m, details = result["metrics"], result["details"]
    assert m["coherence"] == pytest.approx(directions(unit(run.sae.W_dec.detach()))["coherence"])
    null = {"coherence", "effective_rank", "correlation"}
    assert null <= details["null"].keys() and details["condition"]["active"]["null"]["median"] > 1
    assert len(details["l0_of_rows"]) == 101 and details["l0_of_rows"][50] == 3
    assert len(details["jl"]["run"]["recall"]) == 5
    write_json(folder / "geometry.json", result)                 # strict JSON
    one = write_run(folder / "one-s0", build(acts, d_sae=1, l0=1.0, activation="relu"), acts)
    write_json(folder / "geometry.json", evaluate("geometry", acts, [one])["one-s0"])
    again = evaluate("geometry", acts, [run])["topk-s0"]
    assert again == result


def test_stability_is_between_seeds_of_the_same_settings(here):
    acts, folder = here
    runs = [write_run(folder / f"topk-s{s}", build(acts, seed=s), acts, seed=s) for s in (0, 1)]
    runs.append(write_run(folder / "topk-l0=2.0-s1", build(acts, seed=1, l0=2.0), acts, seed=1))
    found = evaluate("stability", acts, runs)
    others = {name: list(result["details"]["others"]) for name, result in found.items()}
    assert others == {"topk-s0": ["topk-s1"], "topk-s1": ["topk-s0"], "topk-l0=2.0-s1": []}
    m = found["topk-s0"]["metrics"]
    assert 0 < m["null"] < 1 and 0 < m["matched"] <= m["best"]
    assert found["topk-l0=2.0-s1"]["metrics"] == {}


def test_runs_of_one_name_in_two_folders_are_told_apart(here):
    acts, folder = here
    runs = [write_run(place / f"topk-s{s}", build(acts, seed=s * far), acts, seed=s)
            for place, far in ((folder, 0), (folder / "old", 1)) for s in (0, 1)]
    found = dict(eval_py.EVALS["stability"].make(acts, None, runs, {}))
    assert [found[run]["metrics"]["matched"] > 0.99 for run in runs] == [True, True, False, False]


def test_stability_is_made_again_when_a_seed_comes(here):
    acts, folder = here
    runs = [write_run(folder / f"topk-s{s}", build(acts, seed=s), acts, seed=s) for s in (0, 1)]
    eval_py.evaluate("stability", acts, None, runs, [])
    assert eval_py.stored("stability", runs[0], acts)
    write_run(folder / "topk-s2", build(acts, seed=2), acts, seed=2)
    assert not eval_py.stored("stability", runs[0], acts)
