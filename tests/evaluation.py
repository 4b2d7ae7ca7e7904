"""Toy caches and run folders for the tests of stage 3: random language models, known features."""
import importlib
import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from sae import (FORMAT, SAE, Acts, checksum, generator, load_variant, write_json,  # noqa: E402
                 write_tensors)
from toys import hierarchy  # noqa: E402

eval_py = importlib.import_module("03_eval")
CPU = torch.device("cpu")
VOCAB, CTX, D, LAYERS = 50, 12, 16, 3

SIZE = dict(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
            pad_token_id=None)
GROUPED = SIZE | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
ROPE = {"rope_type": "linear", "factor": 4.0}


def configurations():
    """{name: configuration of a tiny model} of what stage 3 must be right for."""
    t = transformers
    rope = {"rope_parameters": ROPE | {"rope_theta": 500.0}}
    if t.__version__ < "5":
        rope = {"rope_scaling": ROPE, "rope_theta": 500.0}
    return {
        "gpt2": lambda: t.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=D, n_layer=LAYERS,
                                     n_head=2, bos_token_id=0, eos_token_id=0),
        "pythia": lambda: t.GPTNeoXConfig(**SIZE, rotary_pct=0.5),
        "llama": lambda: t.LlamaConfig(**SIZE),
        "llama, rope base and scaling": lambda: t.LlamaConfig(**GROUPED, **rope),
        "llama, tied": lambda: t.LlamaConfig(**SIZE, tie_word_embeddings=True),
        "mistral": lambda: t.MistralConfig(**GROUPED, sliding_window=4),
        "qwen2": lambda: t.Qwen2Config(**GROUPED),
        "qwen3": lambda: t.Qwen3Config(**GROUPED, head_dim=4),
        "gemma2": lambda: t.Gemma2Config(**GEMMA, final_logit_softcapping=5.0,
                                         attn_logit_softcapping=5.0),
        "gemma3": lambda: t.Gemma3TextConfig(**GEMMA),
        "gemma3, with vision": lambda: t.Gemma3Config(
            text_config=GEMMA,
            vision_config=dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                               intermediate_size=8, image_size=28, patch_size=14),
            mm_tokens_per_image=4, image_token_index=49, boi_token_index=47, eoi_token_index=48),
        "olmo2": lambda: t.Olmo2Config(**SIZE),
        "phi3": lambda: t.Phi3Config(**SIZE | {"pad_token_id": 0}),
    }


@torch.no_grad()
def random_model(name, folder):
    """A causal model in `folder`; its weights are large, so that predictions need the hook."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = configurations()[name]()
        exact = {}           # sdpa leaves Gemma-2's soft cap out
        if getattr(config, "attn_logit_softcapping", None):
            exact = {"attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_config(config, **exact).eval()
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape) * 0.4)
    model.save_pretrained(folder)
    return model


def language_cache(folder, name="llama", layer=1, hook="resid_post", contexts=20, norm_limit=None):
    """The cache of a random language model; contexts of 6 to CTX tokens, the first one no row.

    -> (model, tokens, mask) of the held-out contexts."""
    model = random_model(name, folder / "model")
    tokens = torch.randint(1, 47, (contexts + 100, CTX), generator=generator("tokens")).int()
    length = torch.randint(6, CTX + 1, (len(tokens), 1), generator=generator("lengths"))
    mask = torch.arange(CTX)[None] < length
    mask[:, 0] = False
    entry = {"name": "toy", "path": str(folder / "model"), "revision": None, "n_layers": LAYERS}
    described = dict(source="model", layer=layer, hook=hook, model=entry,
                     hook_name=f"blocks.{layer}.hook_{hook}")
    val = {"tokens": tokens[:contexts], "mask": mask[:contexts]}
    write_meta(folder, torch.zeros(4, D), val, contexts, **described)
    hidden = eval_py.LanguageModel(Acts(folder), CPU).activations(tokens.long())
    rows = hidden[contexts:][mask[contexts:]]
    write_meta(folder, rows, val, contexts, norm_limit=norm_limit, **described)
    return model, tokens[:contexts].long(), mask[:contexts]


def truth_cache(folder, n=4000):
    """The cache of orthonormal features in trees of a parent and exclusive children, without noise.

    -> directions [16, 32], parent [16]."""
    x, on, directions, parent = hierarchy(2 * n, trees=4, noise=0.0)
    sizes = (x @ directions.T - (x @ directions.T).min(0).values).clamp_min(0)
    x = (on * sizes) @ directions                # without the mean that was taken off
    truth = {"dictionary": directions, "probability": on.float().mean(0), "parent": parent.int()}
    said = write_tensors(folder / "truth.safetensors", truth)
    write_meta(folder, x[n:], {"acts": x[:n], "features": (on * sizes)[:n]}, n, source="synthetic",
               layer=None, hook=None, hook_name="synthetic", model={"name": "synthetic"},
               truth={"file": "truth.safetensors", "checksum": said})
    return directions, parent


def write_meta(folder, rows, val, n_val, norm_limit=None, **described):
    said = write_tensors(folder / "train_00000.safetensors", {"acts": rows})
    held = write_tensors(folder / "val.safetensors", val)
    mean = rows.double().mean(0)
    norm = (rows - mean).norm(dim=-1).mean().clamp_min(1e-9).item()
    limit = norm_limit or 10 * rows.norm(dim=-1).median().item()
    shard = {"file": "train_00000.safetensors", "rows": len(rows), "checksum": said}
    write_json(folder / "meta.json", {
        "format": FORMAT, "complete": True, "d_in": rows.shape[1], "dtype": "float32",
        "rows": len(rows), "shards": [shard], "mean": mean.tolist(),
        "val": {"file": "val.safetensors", "checksum": held, "contexts": n_val},
        "scale": rows.shape[1] ** 0.5 / norm, "norm_limit": limit, **described})


def build(acts, variant="topk", seed=0, **settings):
    """An SAE of a variant (name or class) for a cache, started from its rows, in eval mode."""
    cls = load_variant(variant) if isinstance(variant, str) else variant
    sae = cls(acts.d_in, 960, seed, **{"d_sae": 32, "l0": 3.0, "batch_size": 100, **settings})
    sae.mean.copy_(acts.mean)
    sae.scale.fill_(acts.scale)
    sae.init_from_data(sae.normalise(acts.shard(0)["acts"][:512]))
    sae.step = sae.steps
    return sae.eval().requires_grad_(False)


@torch.no_grad()
def with_decoder(acts, directions, encoder=None, bias=-1e-3):
    """A ReLU SAE of raw activations, without centring: decoder rows `directions`, encoder columns
    the same (or `encoder` [d_sae, d_in])."""
    sae = build(acts, SAE, d_sae=len(directions), l0=1.0)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_((directions if encoder is None else encoder).T)
    sae.b_enc.fill_(bias)
    sae.b_dec.copy_(-acts.mean * acts.scale)
    return sae


def identity(acts):
    """An SAE that gives back its input."""
    axes = torch.eye(acts.d_in)
    return with_decoder(acts, torch.cat([axes, -axes]), bias=0.0)


def write_run(folder, sae, acts, variant="topk", seed=0, log=(), start=None, **changed):
    """The run folder that 02_train.py leaves; -> Run. start: the weights that training began at."""
    said = write_tensors(folder / "sae.safetensors", sae.state_dict())
    if start is None:        # far from where the SAE is now
        start = {}
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            start[name] = torch.randn(getattr(sae, name).shape, generator=generator(name))
    began = write_tensors(folder / "start.safetensors", start)
    config = {"format": FORMAT, "name": folder.name, "variant": variant, "acts": acts.folder.name,
              "acts_checksum": acts.checksum, "d_in": acts.d_in, "seed": seed, "steps": 960,
              **{key: acts.meta[key] for key in ("model", "layer", "hook_name")},
              "settings": {key: getattr(sae, key) for key in type(sae).settings()},
              "code_checksum": type(sae).code_checksum(), "parent": "baseline", "void": [],
              "status": "done",
              "start_checksum": began, "sae_checksum": said, **changed}
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (folder / "metrics.jsonl").write_text(lines)
    config["log_checksum"] = checksum(lines.encode())
    write_json(folder / "config.json", config)
    return eval_py.Run(folder, config, sae)


def evaluate(name, acts, runs):
    """{run's name: result} of one evaluation; an error in place of a result is raised."""
    model = None
    if acts.meta["source"] == "model":
        model = eval_py.LanguageModel(acts, CPU)
    found = {}
    for run, result in eval_py.EVALS[name].make(acts, model, runs, {}):
        if isinstance(result, Exception):
            raise result
        found[run.name] = result
    return found


def core(acts, **saes):
    """{name: result of core} of SAEs, each as a run of its own in a new folder beside the cache."""
    runs = [write_run(acts.folder / "runs" / name, sae, acts) for name, sae in saes.items()]
    return evaluate("core", acts, runs)


def fired(result, level=None):
    """The names of the guards that fired."""
    return {guard["name"] for guard in result["guards"] if level in (None, guard["level"])}
