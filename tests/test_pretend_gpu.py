"""Promises of the pretended GPU (pretend_gpu.py), and of SAEBench on it; test_gpu.py has those of training and of the four scripts."""
import copy
import gc
import importlib
import threading

import pytest
import torch
from pretend_gpu import HERE, pretended
from test_saebench import TEMPLATES, exam, labelled, make_run, neox, random_sae, result, same, with_settings, world  # noqa: F401

ev = importlib.import_module("03_eval")
GPU = torch.device("cuda")


@pytest.fixture
def gpu():
    with pretended():
        yield


def test_what_is_made_there_or_moved_there_is_there_and_comes_back(gpu):
    x = torch.arange(6.0).view(2, 3)
    there = x.to(GPU)
    made = [there, x.cuda(), torch.zeros(2, device="cuda"), torch.tensor([1.0], device=GPU), there @ there.T, there[:, 0], there.new_ones(3),
            torch.zeros_like(there), there.softmax(-1), torch.nn.functional.one_hot(there.long()), torch.nn.Linear(3, 2).to(GPU).weight]
    assert {t.device for t in made} == {HERE} and all(t.is_cuda for t in made)
    assert not x.is_cuda and torch.equal((there + 1).cpu(), x + 1) and type(there.cpu()) is torch.Tensor and there.tolist() == x.tolist()
    assert {t.device.type for t in (there.to("cpu"), torch.zeros(2), there.new_ones(3, device="cpu"), x + 1)} == {"cpu"}


@pytest.mark.parametrize("wrong", [lambda x, there: x + there, lambda x, there: there.add_(x), lambda x, there: x @ there.T, lambda x, there: x[there > 0],
                                   lambda x, there: torch.cat([x, there]), lambda x, there: there.gather(0, x.long()), lambda x, there: x.sum().add_(there[0, 0]),
                                   lambda x, there: there.index_select(0, torch.tensor([0])), lambda x, there: torch.stack([x.sum(), there.sum()]),
                                   lambda x, there: torch.rand(2, generator=torch.Generator(), device=GPU), lambda x, there: there.bernoulli(generator=torch.Generator()),
                                   lambda x, there: there.numpy(), lambda x, there: torch.nn.Linear(3, 2)(there)])
def test_it_refuses_what_a_gpu_refuses(gpu, wrong):
    x = torch.rand(2, 3)
    with pytest.raises((RuntimeError, TypeError), match="same device|generator|convert cuda"):
        wrong(x, x.to(GPU))


def test_it_takes_what_a_gpu_takes_from_a_cpu(gpu):
    there = torch.rand(4, 3).to(GPU)
    row = torch.tensor([0, 2])
    assert {t.device for t in (there * torch.tensor(2.0), there[row], there[[0, 2]], there.clone().copy_(torch.zeros(4, 3)))} == {HERE}
    there[row, 0] = 5.0
    assert there[:, 0].cpu()[row].tolist() == [5.0, 5.0]


def test_gradients_optimizer_autocast_and_threads_work_on_it(gpu):
    def loss(device, x):
        layer = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        layer = layer.to(device)
        opt = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
        with torch.autocast(device, torch.bfloat16):
            y = layer(x.to(device))
        y.float().square().sum().backward()
        opt.step()
        return y.dtype, layer.weight.device.type, opt.state_dict()["state"][0]["exp_avg"].device.type, layer.weight.detach().cpu()

    x, found = torch.rand(5, 3), []
    thread = threading.Thread(target=lambda: found.append(loss("cuda", x)))
    thread.start()
    thread.join()
    on_cpu = loss("cpu", x)
    assert found[0][:3] == (torch.bfloat16, "cuda", "cuda") and torch.equal(found[0][3], on_cpu[3])


def test_the_memory_that_tensors_take_there_is_counted_once_and_given_back(gpu):
    before, x = torch.cuda.memory_allocated(), torch.zeros(1000, 250).to(GPU)
    view, more = x[:10], x + 1
    assert torch.cuda.memory_allocated() - before == 2e6
    del x, more
    assert torch.cuda.memory_allocated() - before == 1e6 and view.shape == (10, 250)           # which the view still needs
    torch.cuda.reset_peak_memory_stats()
    del view
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() - before == 1e6


def test_it_is_gone_afterwards():
    before = torch.cuda.is_available, torch.Generator, torch.autocast, torch.load
    with pretended():
        assert torch.cuda.is_available() and torch.Generator(GPU).device == GPU
    assert (torch.cuda.is_available, torch.Generator, torch.autocast, torch.load) == before


def on_both(acts, name):
    """What an evaluation of the same SAE gives on the CPU and on the pretended GPU."""
    sae, found = random_sae(acts), []
    for place, device in (("here", torch.device("cpu")), ("there", HERE)):
        failures, run = {}, make_run(f"{name}-{place}", copy.deepcopy(sae))
        with pretended():
            run.sae.to(device)
            ev.evaluate_saebench(acts, [run], [name], False, device, failures)
        assert not failures
        found.append(result(run, name))
        assert found[-1]["sae_cfg_dict"]["device"] == str(device)
    return found


@pytest.mark.parametrize("name", ["saebench_core", "absorption", "sparse_probing", pytest.param("scr", marks=pytest.mark.slow), "tpp", "unlearning"])
def test_saebenchs_figures_on_it_are_the_cpus(world, labelled, name):  # noqa: F811
    here, there = on_both(world if name in ("saebench_core", "absorption") else labelled, name)
    for key in ("eval_result_metrics", "eval_result_details", "guards", "metrics"):
        same(there[key], here[key], key)


@pytest.mark.parametrize("name", ["saebench_core", "absorption", "sparse_probing", pytest.param("scr", marks=pytest.mark.slow), "tpp", "unlearning"])
def test_it_holds_the_language_model_one_sae_and_a_buffer_whatever_the_texts_and_runs(world, labelled, name, monkeypatch):  # noqa: F811
    """Where a buffer is too small for a data set's activations or codes, as 8 GB are for SAEBench's. Absorption's is for SAEBench's batches of 64
    prompts, of 77 tokens here."""
    acts, buffer = (world if name in ("saebench_core", "absorption") else labelled), 2**26 if name == "absorption" else 2**23
    monkeypatch.setattr(ev, "LOGITS", buffer // 32)
    monkeypatch.setattr(ev, "CODES", buffer // 128)
    monkeypatch.setattr(ev, "ON_DEVICE", 1)
    size, failures = lambda tensors: sum(v.nbytes for v in tensors.values()), {}
    with pretended():
        model = size(ev.Bench(acts, HERE).model.state_dict())
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runs = [make_run(f"held-{name}-{seed}", random_sae(acts, seed, 400)) for seed in (1, 2)]
        for part in ev.portions(runs):
            with ev.on_device(HERE, part):
                ev.evaluate_saebench(acts, part, [name], False, HERE, failures)
        taken, one = torch.cuda.max_memory_allocated() - before, size(runs[0].sae.state_dict())
    assert not failures and all(result(run, name) for run in runs)
    assert model + one < taken < model + one + buffer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unlearning", "sae_probes", "ravel"])
def test_so_are_those_that_need_data_of_their_own(world, exam, neox, name, monkeypatch):  # noqa: F811
    if name == "ravel":
        with_settings(monkeypatch, neox, name, config={"llm_batch_size": 8, "entity_attribute_selection": {"word": list(TEMPLATES)}})
    if name == "sae_probes":
        with_settings(monkeypatch, world, name, datasets=["119_us_state_TX", "87_glue_cola"])
    here, there = on_both({"unlearning": exam, "sae_probes": world, "ravel": neox}[name], name)
    same(there["eval_result_metrics"], here["eval_result_metrics"])
