"""Promises of the analyses in 03_eval.py (geometry, stability, training): planted geometries give the numbers that theory says."""
import importlib
import sys
import math

import pytest
import torch
from test_eval import CPU, D, finished_run, language_cache, some_sae, truth_cache, with_decoder
from toys import orthonormal, train_py

from sae import SAE, Acts, generator, load_run, read_json, unit, write_tensors

ev = importlib.import_module("03_eval")


def rows(n, d, key="rows"):
    return torch.randn(n, d, generator=generator(key, n, d))


# ---- directions ---------------------------------------------------------------------------------------------------------------------


def test_an_orthonormal_dictionary_has_no_coherence_and_full_rank():
    m = ev.directions(orthonormal(32))
    assert m["coherence"] < 1e-6 and m["mean_square_cosine"] < 1e-12 and m["unique"] == 1.0
    assert m["effective_rank"] == pytest.approx(32, rel=1e-6) and m["frame_ratio"] == pytest.approx(1, rel=1e-6)


def test_duplicated_and_opposite_latents_are_seen():
    W = orthonormal(8)
    m = ev.directions(torch.cat([W, W[:4]]), block=5)
    assert m["pairs_above"] == {"0.3": 4, "0.5": 4, "0.9": 4} and m["unique"] == pytest.approx(4 / 12)
    assert m["mean_max_cosine"] == pytest.approx(8 / 12) and m["coherence"] == pytest.approx(1) and m["frame_ratio"] is None
    m = ev.directions(torch.cat([W, -W[:4]]))
    assert m["coherence"] == pytest.approx(1) and m["unique"] == 1.0 and sum(m["pairs_above"].values()) == 0


def test_blocks_give_what_all_pairs_at_once_give():
    W = unit(rows(100, 16))
    cosine = W @ W.T
    others = cosine[~torch.eye(100, dtype=torch.bool)]
    m = ev.directions(W, block=7)
    assert m["mean_abs_cosine"] == pytest.approx(others.abs().mean().item(), rel=1e-5)
    assert m["mean_square_cosine"] == pytest.approx(others.square().mean().item(), rel=1e-5)
    assert m["coherence"] == pytest.approx(others.abs().max().item()) and m["pairs_above"]["0.3"] == (others > 0.3).sum().item() // 2


def test_no_dictionary_is_below_welchs_floor_and_a_tight_frame_reaches_it():
    welch = lambda n, d: (n - d) / (d * (n - 1))
    assert ev.directions(unit(rows(200, 32)))["mean_square_cosine"] > welch(200, 32)
    tight = torch.cat([orthonormal(32), orthonormal(32, seed=1)])
    assert ev.directions(tight)["mean_square_cosine"] == pytest.approx(welch(64, 32), rel=1e-4)


def test_the_effective_rank_is_that_of_the_subspace():
    W = unit(rows(400, 5)) @ orthonormal(5)
    assert 4.5 < ev.directions(W)["effective_rank"] <= 5 + 1e-6


# ---- condition numbers -----------------------------------------------------------------------------------------------------------------


def test_condition_numbers_of_orthonormal_near_duplicate_and_dependent_sets():
    W = orthonormal(8)
    sets = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    assert ev.condition(W, sets)["median"] == pytest.approx(1, abs=1e-6)
    angle = 0.01
    near = torch.stack([W[0], math.cos(angle) * W[0] + math.sin(angle) * W[1]])
    expected = math.sqrt((1 + math.cos(angle)) / (1 - math.cos(angle)))
    assert ev.condition(near, [torch.tensor([0, 1])])["median"] == pytest.approx(expected, rel=1e-3)
    dependent = ev.condition(torch.cat([W, W]), [torch.tensor([0, 8])])
    assert dependent["median"] is None and dependent["infinite"] == 1
    assert ev.condition(unit(rows(20, 4)), [torch.arange(5)])["infinite"] == 1                 # more rows than dimensions


def test_random_directions_have_the_condition_number_of_marchenko_and_pastur():
    W, g = unit(rows(4000, 512)), generator("sets")
    sets = [torch.randperm(4000, generator=g)[:64] for _ in range(20)]
    assert ev.condition(W, sets)["median"] == pytest.approx(ev.marchenko_pastur(sets, 512), rel=0.06)
    assert ev.marchenko_pastur(sets, 64) is None and ev.marchenko_pastur([], 64) is None


# ---- random projections -----------------------------------------------------------------------------------------------------------------


def test_projection_errors_fall_as_one_over_root_k_and_are_exact_from_d_on():
    found = ev.projections(unit(rows(300, 256)), generator("jl"))
    k = torch.tensor(ev.JL_DIMENSIONS[:3], dtype=torch.double)
    theory = ((1 - k / 256) / k).sqrt()                                                            # of orthonormal axes, for cosines near 0
    assert found["error_sd"][:3] == pytest.approx(theory.tolist(), rel=0.1)
    assert found["reconstruction"][:3] == pytest.approx((k / 256).tolist(), rel=0.1)
    assert max(found["error_max"][3:]) < 1e-5 and found["recall"][3:] == [1.0, 1.0] and found["reconstruction"][3] == pytest.approx(1)
    assert found["recall"][0] < found["recall"][1] < found["recall"][2] < 1


def test_pairs_above_a_threshold_are_counted_in_truth_and_in_the_projection():
    above = ev.projections(torch.cat([orthonormal(64, 64)] * 2), generator("jl"))["above"]          # 64 pairs are one, all others orthogonal
    assert above["0.4"]["recall"] == [1.0] * 5 and above["0.4"]["precision"][1:] == [1.0] * 4
    rough = math.erfc(0.05 / (1 / 64) ** 0.5 / 2 ** 0.5) / 2                                    # cosines of 32 of 64 axes: normal, sd sqrt((1 - 1/2) / 32)
    assert above["0.05"]["precision"][0] == pytest.approx(64 / (64 + rough * 128 * 126 / 2), rel=0.15)
    none = ev.projections(orthonormal(64, 64), generator("jl"))["above"]["0.4"]
    assert none["recall"] == [None] * 5 and none["precision"][1:] == [None] * 4                 # there is nothing to find


# ---- codes -------------------------------------------------------------------------------------------------------------------------------


def planted_code(on, directions=None):
    """Code of an SAE that reads the rows `on` [n, 16] of zeros and ones as they are."""
    sae = with_decoder(FAKE, torch.eye(16) if directions is None else directions)
    return ev.Code(sae, on.float(), generator("latents"))


class FAKE:
    d_in, scale = 16, 1.0


def test_latents_that_fire_together_are_a_group_and_correlate():
    on = torch.zeros(4000, 16)
    together = torch.rand(4000, 4, generator=generator("groups")) < 0.25
    for i in range(16):
        on[:, i] = together[:, i // 4]                                                         # four groups of four that are one
    code = planted_code(on)
    sets = code.sets(generator("sets"))
    assert all(len({i // 4 for i in s.tolist()}) == 1 for s in sets["group"]) and len(sets["group"][0]) == 4
    assert any(len({i // 4 for i in s.tolist()}) > 1 for s in sets["across"])
    assert ev.mean_correlation(code.acts) == pytest.approx(3 / 15, abs=0.02)                    # 3 of 15 others are the same
    assert ev.mean_correlation(ev.shifted(code.acts, generator("shift"))) < 0.03


def test_sparsity_of_known_codes():
    one = torch.eye(16).repeat(10, 1)
    m = planted_code(one).metrics()
    assert m["hoyer"] == pytest.approx(1) and m["gini"] == pytest.approx(0, abs=1e-6) and set(m["l0_of_rows"]) == {1.0}
    m = planted_code(torch.ones(50, 16)).metrics()
    assert m["hoyer"] == pytest.approx(0, abs=1e-6) and set(m["l0_of_rows"]) == {16.0} and m["correlation"] == 0
    single = torch.zeros(50, 16)
    single[:, 3] = 1
    m = planted_code(single).metrics()
    assert m["gini"] == pytest.approx(15 / 16) and m["correlation"] is None
    silent = planted_code(torch.zeros(50, 16))
    assert silent.metrics()["hoyer"] is None and silent.sets(generator("sets")) == {"group": [], "across": [], "active": []}
    assert ev.pair_stability(silent) is None


def test_pairs_that_always_fire_together_are_chosen_in_every_batch_and_independent_ones_by_chance(monkeypatch):
    monkeypatch.setattr(ev, "TOP_PAIRS", 0.1)                                                    # 12 of 120 pairs
    independent = torch.rand(8192, 16, generator=generator("independent")) < 0.3
    planted = independent.clone()
    planted[:, 8:] = independent[:, :8]                                                        # 8 pairs that are one
    stable, chance = ev.pair_stability(planted_code(planted)), ev.pair_stability(planted_code(independent))
    assert stable["rows"] == [256, 1024, 4096] and stable["pairs"] == 12
    assert min(stable["phi"]["jaccard"]) >= 8 / 16 and chance["phi"]["jaccard"][0] < 0.25
    assert stable["null"] == pytest.approx(0.1 / 1.9)


def test_pairs_of_the_densest_latents_are_counted(monkeypatch):
    monkeypatch.setattr(ev, "TOP_PAIRS", 15 / 120)
    on = torch.rand(8192, 16, generator=generator("dense")) < 0.05
    on[:, 5] = True                                                                            # the densest: co-activation picks its 15 pairs, phi none
    found = ev.pair_stability(planted_code(on))
    assert min(found["coactivation"]["dense"]) > 0.9 and max(found["phi"]["dense"]) < 0.3 and found["null_dense"] == pytest.approx(15 / 120)


def test_what_is_lost_in_length_is_seen_in_each_tenth_of_the_norms():
    sae = with_decoder(FAKE, torch.eye(16))
    x = torch.eye(16).repeat(20, 1) * torch.arange(1.0, 11).repeat_interleave(32)[:, None]
    sae.b_enc.data -= 0.5                                                                      # each activation falls short by one half
    tenths = ev.Code(sae, x, generator("latents")).metrics()["tenths"]
    norm = torch.tensor(tenths["norm"])
    assert tenths["l2_ratio"] == pytest.approx(((norm - 0.5) / norm).tolist()) and tenths["slope"] == pytest.approx((norm / (norm - 0.5)).tolist())


def test_jaccard_and_rank_biased_overlap_of_planted_rankings():
    a, other = torch.arange(10), torch.arange(10, 20)
    half = torch.cat([a[:5], other[:5]])
    assert ev.jaccard(a, a) == 1 and ev.jaccard(a, other) == 0 and ev.jaccard(a, half) == pytest.approx(5 / 15)
    assert ev.rank_biased_overlap(a, a) == pytest.approx(1) and ev.rank_biased_overlap(a, other) == 0
    last = torch.cat([other[:5], a[:5]])
    assert 0 < ev.rank_biased_overlap(a, last, 0.9) < ev.rank_biased_overlap(a, half, 0.9) < 1  # the top weighs most
    two = ev.rank_biased_overlap(torch.tensor([0, 1]), torch.tensor([1, 0]), 0.5)
    assert two == pytest.approx((1 * 0 + 0.5 * 1) / 1.5)


# ---- structure ---------------------------------------------------------------------------------------------------------------------------


def test_rows_that_are_sums_of_few_parts_are_explained_by_them_and_random_rows_are_not():
    parts, g = unit(rows(30, 32, "parts")), generator("sums")
    sums = torch.stack([parts[torch.randperm(30, generator=g)[:3]].sum(0) for _ in range(160)])
    assert ev.composition(unit(sums)) > 0.9 and ev.composition(unit(rows(160, 32))) < 0.82                          # 40 latents for 30 parts; 0.98 and 0.73
    assert ev.composition(orthonormal(8)) is None


def family(n=8000):
    """Rows of 16 latents: 0 contains 1 and 2, 1 contains 3; 4 to 15 fire by chance, 15 on most rows, 14 hardly ever."""
    g = generator("family")
    on = torch.rand(n, 16, generator=g) < 0.1
    on[:, 0] = torch.rand(n, generator=g) < 0.4
    on[:, 1] = on[:, 0] & (torch.rand(n, generator=g) < 0.4)
    on[:, 2] = on[:, 0] & (torch.rand(n, generator=g) < 0.2)
    on[:, 3] = on[:, 1] & (torch.rand(n, generator=g) < 0.3)
    on[:, 15] = torch.rand(n, generator=g) < 0.95
    on[:, 14] = torch.arange(n) < 5
    return on


def test_a_planted_hierarchy_is_found_and_what_fires_nearly_always_contains_nothing():
    on = family()
    h = ev.hierarchy(on, torch.arange(16), torch.eye(16))
    assert h["latents"] == 15 and h["contained"] == pytest.approx(3 / 15) and h["depths"] == pytest.approx([12 / 15, 2 / 15, 1 / 15])
    tree, = h["trees"]
    assert [(t["latent"], t["parent"]) for t in tree] == [(0, None), (1, 0), (2, 0), (3, 1)] and tree[1]["given"] == 1.0
    assert h["asymmetry"] == pytest.approx(1 - (0.4 + 0.2 + 0.3) / 3, abs=0.03) and h["cosine"] == 0 and h["parents"] == pytest.approx(2 / 15)
    assert h["by_place"]["parents"][0] == 1.0 and sum(h["by_place"]["parents"][2:]) == 0                           # of 16: 0 and 1 are in the first tenth
    mixed = ev.hierarchy(ev.shifted(on.float(), generator("mixed")) > 0, torch.arange(16), torch.eye(16))
    assert mixed["contained"] == 0 and mixed["trees"] == [] and mixed["depths"] == [1.0] and mixed["asymmetry"] is None


def test_the_largest_tree_comes_first_and_ancestors_are_counted():
    parent = torch.tensor([-1, 0, 1, 2, -1, 4])
    assert ev.depths(parent).tolist() == [0, 1, 2, 3, 0, 1]
    found = ev.trees(parent, list(range(10, 16)), [0.5, 0.4, 0.3, 0.2, 0.1, 0.05], torch.ones(6, 6))
    assert [[t["latent"] for t in tree] for tree in found] == [[10, 11, 12, 13], [14, 15]]


def test_latents_interfere_by_their_cosines_and_a_plane_holds_what_varies_in_a_plane():
    acts = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    found = ev.interference(acts, W)
    assert found["by_rate"] == pytest.approx([0.6 * 0.5, (0.6 * 2 + 0.8 * 2) / 4 / 0.25, 0.8 * 0.25 / 0.5], rel=1e-5)
    plane = torch.randn(500, 2, generator=generator("plane")) @ torch.randn(2, 16, generator=generator("into"))
    assert ev.interference(plane, unit(rows(16, 4)))["captured"][1] == pytest.approx(1)
    assert ev.interference(torch.zeros(9, 3), W)["captured"] == [0.0] * 9


def test_linked_latents_are_one_group_and_a_latent_of_one_token_has_no_entropy():
    W = torch.cat([orthonormal(6, 8), unit(orthonormal(6, 8)[:1] + 0.3 * orthonormal(6, 8)[1:2])])                 # the last one is near the first
    tokens, acts = torch.arange(200) % 4, torch.zeros(200, 7)
    acts[tokens == 2, 0] = 1.0                                                # 50 rows, one token
    acts[:, 1] = 1 - torch.arange(200) / 400                                  # its 20 highest rows have each of the four tokens five times
    acts[:5, 2] = 1.0                                                         # too rare
    code = FakeCode(acts, torch.zeros(7))
    found = ev.diversity(code, W, tokens)
    assert found["clusters"] == 6 / 7 and found["token_entropy"] == pytest.approx((0 + math.log(4)) / 2)
    assert ev.diversity(code, W, None) == {"clusters": 6 / 7}


def test_positions_are_eight_equal_parts_in_order():
    code = FakeCode(torch.ones(64, 3), torch.zeros(3))
    position = torch.arange(64).flip(0)
    code.l0, code.error, code.variance = position.double(), torch.ones(64), torch.full((64,), 4.0)
    found = ev.by_position(code, position)
    assert found["at"] == [4, 12, 20, 28, 36, 44, 52, 60] and found["l0"] == pytest.approx([3.5 + 8 * i for i in range(8)])
    assert found["explained_variance"] == [0.75] * 8


class FakeCode:
    """Pre-activations [n, m] that fire above `threshold` [m]."""

    def __init__(self, pre, threshold):
        self.pre, self.acts = pre, pre * (pre > threshold)
        self.l0 = (self.acts > 0).sum(-1).double()


def test_planted_thresholds_are_read_off_and_one_z_for_all_gives_normal_latents_their_l0():
    normal = 3 * torch.randn(20_000, 40, generator=generator("pre")) + torch.arange(40.0)
    found = ev.thresholds(FakeCode(normal, torch.arange(40.0) + 6), 40)                                           # two standard deviations above
    assert found["ratio"] == pytest.approx(1, abs=0.05) and found["z"] == pytest.approx(2, abs=0.05) and found["rule"] == pytest.approx(2, abs=0.05)
    assert found["threshold"] == pytest.approx([i + 6 for i in range(40)], abs=0.1) and found["by_rule"] == pytest.approx(found["threshold"], abs=0.3)
    assert max(map(abs, found["kurtosis"])) < 0.3
    laplace = torch.distributions.Laplace(0, 1).icdf(torch.rand(20_000, 40, generator=generator("laplace")))
    heavy = ev.thresholds(FakeCode(laplace, torch.full((40,), 4.0)), 40)
    assert sorted(heavy["kurtosis"])[50] == pytest.approx(3, abs=0.7) and heavy["ratio"] > 2                      # Q(2.8) is 0.0023, the tail 0.0092
    assert ev.thresholds(FakeCode(normal, torch.full((40,), 1e9)), 40) is None


def test_rounding_to_bfloat16_moves_what_it_should_and_nothing_in_the_run(here):
    finished_run(here, Acts("acts/toy"))
    before = load_run(here / "topk-s0")[0].state_dict()
    found = evaluated("core", "structure")["topk-s0"]
    p, core = found["structure"]["precision"], found["core"]["metrics"]
    assert p["fp32"]["ce_clean"] == pytest.approx(core["ce_clean"]) and p["fp32"]["explained_variance"] == pytest.approx(core["explained_variance"])
    assert 0 < abs(p["weights"]["mse"] / p["fp32"]["mse"] - 1) < 0.05 and p["weights_acts"]["mse"] != p["weights"]["mse"]
    assert p["losses"]["ce_sae"] == torch.tensor(core["ce_sae"]).bfloat16().item() and p["losses"]["ce_recovered"] != core["ce_recovered"]
    after = load_run(here / "topk-s0")[0].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_parents_that_their_children_silence_are_missed_at_the_childrens_depth(tmp_path):
    truth_cache(tmp_path / "toy")
    acts = Acts(tmp_path / "toy")
    held_out = ev.HeldOut(acts, CPU)
    W = held_out.truth.dictionary
    assert ev.missed(held_out, with_decoder(acts, W)) == {"depth": [1], "missed": [0.0], "pairs": [12]}
    encoder = W.T.clone()
    for parent, child in zip(held_out.truth.parent, held_out.truth.child):
        encoder[:, parent] -= 9 * W[child]                                    # a child on turns its parent's latent off
    assert ev.missed(held_out, with_decoder(acts, W, encoder))["missed"] == [1.0]
    held_out.truth = ev.Truth({"dictionary": W, "parent": torch.tensor([-1, 0, 1, 2, *[-1] * 12])}, CPU)
    held_out.val["features"][:20, :4] = 1.0                                   # a chain: each the child of the one before
    held_out.val["features"][20:, :4] = 0.0
    assert ev.missed(held_out, with_decoder(acts, W))["depth"] == [1, 2, 3] and ev.missed(held_out, with_decoder(acts, W))["pairs"] == [1, 1, 1]


def test_structure_stands_in_its_file_beside_its_nulls_of_language_models_and_synthetic_data(here):
    acts = Acts("acts/toy")
    finished_run(here, acts)
    result = evaluated("structure")["topk-s0"]["structure"]
    assert set(result["composition"]) == {"run", "null"} and result["thresholds"]["rule"] > 0 and "missed" not in result
    assert result["hierarchy"]["latents"] >= 2 and len(result["hierarchy"]["containment"]) == 101


# ---- stability -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def permuted(sae, order):
    other = some_sae(FAKE_OF(sae), activation=sae.activation, d_sae=sae.d_sae, l0=sae.l0)
    other.load_state_dict({k: v[order] if k in ("W_dec", "b_enc") else v[:, order] if k == "W_enc" else v for k, v in sae.state_dict().items()})
    return other


def FAKE_OF(sae):
    class Acts:
        d_in, scale = sae.d_in, sae.scale.item()

        @staticmethod
        def shard(i):
            return {"acts": rows(64, sae.d_in, "init")}
    return Acts


@torch.no_grad()
def test_a_permuted_dictionary_is_found_again_in_full():
    x = rows(500, 16, "x")
    sae = with_decoder(FAKE, unit(rows(40, 16)))
    found = ev.compare(sae, permuted(sae, torch.randperm(40, generator=generator("order"))), x)
    for key in ("matched", "encoder", "best", "activations", "pairs"):
        assert found[key] == pytest.approx(1, abs=1e-5), key
    assert found["again"] == {"0.7": 1.0, "0.8": 1.0, "0.9": 1.0} and found["by_rate"] == pytest.approx([1.0] * 10)


@torch.no_grad()
def test_opposite_directions_are_not_the_same_latents():
    W = orthonormal(16, d_in=16)
    assert ev.match(W, -W)[2].mean() < 0.1 and ev.match(W, W)[2].min() > 0.999


def test_random_dictionaries_match_as_the_null_says():
    n, d = 400, 64
    a, b = unit(rows(n, d, "a")), unit(rows(n, d, "b"))
    matched = ev.match(a, b)[2].mean().item()
    assert matched == pytest.approx(ev.match(unit(rows(n, d, "c")), unit(rows(n, d, "d")))[2].mean().item(), rel=0.03)
    assert 0.5 * math.sqrt(2 * math.log(n) / d) < matched < math.sqrt(2 * math.log(n) / d)        # that is the best of n, one-to-one takes less


def test_the_rest_may_lie_in_the_same_subspace_though_no_latent_is_found_again():
    W = orthonormal(64, 64)
    a, b = (unit(rows(100, 16, key)) @ W[:16] for key in "ab")
    far = unit(rows(100, 48, "c")) @ W[16:]
    assert ev.subspace(a, b) == {"rows": 100, "size": 16, "cosine": pytest.approx(1, abs=1e-4), "null": 0.25} and ev.subspace(a, far)["cosine"] < 1e-4
    chance = ev.subspace(unit(rows(100, 64, "d")), unit(rows(100, 64, "e")))
    assert chance["cosine"] == pytest.approx(0.25, abs=0.06) and ev.subspace(a[:1], b[:1]) is None


def test_large_dictionaries_are_matched_by_a_sample(monkeypatch):
    monkeypatch.setattr(ev, "GEOMETRY_LATENTS", 10)
    W = unit(rows(40, 16))
    mine, theirs, cosine = ev.match(W, W.flip(0))
    assert len(mine) == 10 and theirs.tolist() == (39 - mine).tolist() and cosine.min() > 0.999


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def evaluated(*names):
    """--eval NAMES of all runs under runs/ as main() does it; -> {folder name: {eval: its JSON}}."""
    failures, folders = {}, ev.run_folders([])
    acts = Acts("acts/toy")
    ev.evaluate(acts, ev.load(folders, failures), names, False, None, CPU, failures)
    assert not failures
    return {f.name: {n: read_json(f / "eval" / f"{n}.json") for n in names} for f in folders}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    language_cache(tmp_path / "acts" / "toy")
    return tmp_path / "runs"


def test_geometry_of_a_run_stands_in_its_file_beside_the_null(here):
    finished_run(here, Acts("acts/toy"))
    result = evaluated("geometry")["topk-s0"]["geometry"]
    W = load_run(here / "topk-s0")[0].W_dec.detach()
    assert result["metrics"]["mean_max_cosine"] == pytest.approx(ev.max_cosine(W).mean().item(), rel=1e-5)
    assert result["null"]["effective_rank"] <= D and result["null"]["welch"] == pytest.approx((32 - D) / (D * 31))
    assert set(result["condition"]) == {"group", "across", "active"} and result["condition"]["active"]["run"]["sets"] == 64
    assert result["jl"]["run"]["recall"][0] == 1.0 and result["metrics"]["l0_of_rows"][50] == 3.0                # d_in is 16


def test_the_same_numbers_come_out_twice_and_alone_or_among_others(here):
    acts = Acts("acts/toy")
    finished_run(here, acts)
    finished_run(here, acts, "topk-s1", seed=1)
    strip = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "shared_by", "checksum")}
    both = evaluated("geometry", "stability")["topk-s1"]
    for name in both:
        (here / "topk-s1" / "eval" / f"{name}.json").unlink()
    again = evaluated("geometry", "stability")["topk-s1"]
    assert {k: strip(v) for k, v in both.items()} == {k: strip(v) for k, v in again.items()}


def test_stability_is_between_seeds_of_the_same_settings_and_made_again_when_one_comes(here):
    acts = Acts("acts/toy")
    for name, seed, settings in (("topk-s0", 0, {}), ("topk-s1", 1, {}), ("topk-l0=2.0-s1", 1, {"l0": 2.0})):
        finished_run(here, acts, name, seed=seed, **settings)
    found = evaluated("stability")
    others = {name: list(result["stability"]["others"]) for name, result in found.items()}
    assert others == {"topk-s0": ["topk-s1"], "topk-s1": ["topk-s0"], "topk-l0=2.0-s1": []}
    assert 0 < found["topk-s0"]["stability"]["null"]["matched"] < 1
    finished_run(here, acts, "topk-s2", seed=2)
    assert list(evaluated("stability")["topk-s0"]["stability"]["others"]) == ["topk-s1", "topk-s2"]


def test_synthetic_data_have_a_geometry_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth_cache(tmp_path / "acts" / "toy", n=600)
    finished_run(tmp_path / "runs", Acts("acts/toy"))
    result = evaluated("geometry")["topk-s0"]["geometry"]
    assert result["rows"] == 600 and result["pairs"] is None                                   # a thousandth of 496 pairs is none


# ---- how latents live ----------------------------------------------------------------------------------------------------------------------


def test_kaplan_and_meiers_estimate_is_the_textbooks():
    weeks = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]      # remission in leukaemia, Freireich 1963: 9 ended
    ended = [1] * 9 + [0] * 12
    found = ev.kaplan_meier(torch.tensor(weeks).float(), torch.tensor(ended).float(), [0, 6, 7, 10, 13, 16, 22, 23, 35, 36])
    assert found == pytest.approx([1, 0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448, 0.448, None], abs=6e-4)


def at_stage(step, silent, revived_at=None):
    """An SAE of four latents at a step of 100, as far as its lives go."""
    sae = SAE(16, 100, 0, d_sae=4, l0=1.0, batch_size=10)
    sae.step = step
    sae.silent.copy_(torch.tensor(silent))
    if revived_at is not None:
        sae.revived_at = torch.tensor(revived_at)
    return sae


def test_a_life_ends_when_the_latent_fired_last_or_is_revived_and_begins_anew_then():
    stages = [at_stage(20, [0., 0., 20., 15.], [0., 0., 0., 0.]), at_stage(50, [0., 30., 4., 45.], [0., 0., 30., 0.]), at_stage(100, [0., 80., 40., 1.], [0., 0., 30., 60.])]
    found = ev.survival(stages)
    # from the start: 0 goes on to 100; 1 ended at 20; 2 at 0, as it never fired; 3 at 5, after which it was silent until it was revived at 60
    assert [found["start"][i] for i in (0, 1, 2, 7, 8, 40)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    # revived: 2 at 30, fired last at 60; 3 at 60, fires at the end
    assert [found["revived"][i] for i in (0, 11, 12, 16, 17)] == [1.0, 1.0, 0.5, 0.5, None] and found["tokens"][40] == 1000
    assert ev.survival([at_stage(50, [0.] * 4), at_stage(100, [0.] * 4)]) == {"tokens": found["tokens"], "start": [1.0] * 41, "revived": None}


def test_a_latent_that_fires_again_by_itself_was_not_dead():
    assert ev.survival([at_stage(50, [40.] * 4), at_stage(100, [0.] * 4)])["start"][-1] == 1.0


def test_latents_with_the_most_load_that_die_are_in_the_last_tenth():
    load = torch.arange(100.0).flip(0)
    assert ev.deaths(load, (load >= 95).float()) == pytest.approx([0] * 9 + [0.5]) and ev.deaths(load[:9], load[:9]) == []


def test_the_half_life_is_read_between_stages():
    assert ev.half_life([100, 200, 400, 800], [0.1, 0.2, 0.6, 1.0]) == pytest.approx(800 - (200 + 200 * 3 / 4))
    assert ev.half_life([100, 200], [0.3, 1.0]) == pytest.approx(100 * 5 / 7) and ev.half_life([100, 200], [0.6, 1.0]) is None


# ---- training --------------------------------------------------------------------------------------------------------------------------


def trained(monkeypatch, *flags):
    """02_train.py on acts/toy, 40 steps of 100 rows."""
    monkeypatch.setattr(sys, "argv", ["02_train.py", "--acts", "toy", "--set", "d_sae=64", "l0=3", "batch_size=100", "--device", "cpu", *flags])
    assert train_py.main() == 0


def test_snapshots_are_the_run_half_way_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth_cache(tmp_path / "acts" / "toy")
    trained(monkeypatch, "--variant", "topk", "--snapshots", "3")
    (folder,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in sorted((folder / "snapshots").iterdir())] == ["00000005.safetensors", "00000010.safetensors", "00000020.safetensors"]
    said = read_json(folder / "config.json")["sae_checksum"]
    again = folder.rename(tmp_path / "first")
    trained(monkeypatch, "--variant", "topk", "--snapshots", "0")
    assert read_json(folder / "config.json")["sae_checksum"] == said and not (folder / "snapshots").exists() and again.exists()


def test_the_stages_of_a_run_end_at_its_core_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth_cache(tmp_path / "acts" / "toy")
    trained(monkeypatch, "--variant", "topk")
    trained(monkeypatch, "--variant", "revive", "--set", "activation=topk", "revive_every=0.25", "revive_silent=0.0", "lr=0.03")
    found = evaluated("core", "training")
    topk, revive = (next(v for k, v in found.items() if k.startswith(name)) for name in ("topk", "revive"))
    stages = topk["training"]["stages"]
    assert [s["step"] for s in stages] == [1, 2, 5, 10, 20, 40] and stages[-1]["tokens"] == 4000
    end = stages[-1]
    assert end["explained_variance"] == pytest.approx(topk["core"]["metrics"]["explained_variance"]) and "absorption" in end
    assert end["same"] == pytest.approx(1) and end["pairs"] == 1.0 and stages[0]["same"] < end["same"]
    assert stages[0]["explained_variance"] < end["explained_variance"] and end["revived"] == 0 and end["revived_cosine"] is None
    assert [s["revived"] for s in revive["training"]["stages"]] == [0, 0, 0, 64, 64, 64]
    assert [s["revived_cosine"] is None for s in revive["training"]["stages"]] == [True] * 3 + [False] * 3
    assert end["mean_max_cosine"] < 1 and revive["training"]["stages"][-1]["revived_cosine"] == revive["training"]["stages"][-1]["mean_max_cosine"]     # all were
    lives = revive["training"]["survival"]
    assert topk["training"]["survival"]["revived"] is None and lives["tokens"][-1] == 4000
    assert lives["start"][10] is None or lives["start"][10] < 1                # all are revived after step 10
    assert lives["revived"][0] > 0.9 and lives["revived"][30] is None         # and again after 20 and 30: no life is longer than 20 of 40 steps
    assert len(topk["training"]["deaths"]) == 10 and sum(topk["training"]["deaths"]) < sum(revive["training"]["deaths"]) <= 10


def test_a_run_without_snapshots_has_no_stages(here):
    finished_run(here, Acts("acts/toy"))
    assert evaluated("training")["topk-s0"]["training"]["stages"] == []


def test_snapshots_of_another_run_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    truth_cache(tmp_path / "acts" / "toy")
    trained(monkeypatch, "--variant", "topk")
    (folder,) = (tmp_path / "runs").iterdir()
    path = folder / "snapshots" / "00000020.safetensors"
    write_tensors(path, load_run(folder)[0].state_dict(), {"identity": "other", "step": 20})
    failures = {}
    ev.evaluate(Acts("acts/toy"), ev.load([folder], failures), ["training"], False, None, CPU, failures)
    assert "is of another run of this name" in failures[folder]
