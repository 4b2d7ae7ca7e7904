"""Promises on a GPU: run with -m gpu where there is one."""
import pytest
import torch

from sae import variant_names
from toys import build, evaluate, mixture, steps, train_py

pytestmark = pytest.mark.gpu
X = mixture()[0]
KINDS = ["relu", "topk", "batch_topk", "jumprelu"]


def on_gpu(name, **settings):
    sae, _ = build(name, X, **settings)
    sae = sae.cuda()
    return sae, sae.make_optimizer()


@pytest.mark.parametrize("activation", KINDS)
def test_the_first_steps_are_the_cpus_within_bfloat16(activation):
    losses = {}
    for where in ("cpu", "cuda"):
        sae, _ = build("baseline", X, activation=activation)
        sae = sae.to(where)
        log = losses[where] = []
        steps(sae, sae.make_optimizer(), X.to(where), stop=20,
              each=lambda sae, out, terms: log.append(float(sum(terms.values()))))
    assert torch.allclose(torch.tensor(losses["cpu"]), torch.tensor(losses["cuda"]), rtol=0.05)


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_trains_to_its_l0(name):
    sae, opt = on_gpu(name)
    steps(sae, opt, X.cuda())
    sae.step = sae.steps
    ev, l0, _ = evaluate(sae.eval(), X[-8192:].cuda())
    assert ev > 0.3 and abs(l0 - sae.l0) < 0.1 * sae.l0
    assert all(p.dtype == torch.float32 for p in sae.parameters())


def test_a_checkpoint_goes_on_where_it_was():
    sae, opt = on_gpu("topk")
    steps(sae, opt, X.cuda(), stop=50)
    tensors, plain = train_py.pack(sae, opt)
    again, other = on_gpu("topk", seed=1)
    train_py.unpack(again, other, tensors, plain)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in sae.state_dict().items())
    for p, q in zip(sae.parameters(), again.parameters()):
        assert all(torch.equal(opt.state[p][k], other.state[q][k]) for k in opt.state[p])
