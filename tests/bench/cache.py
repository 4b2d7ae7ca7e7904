"""How fast stage 1 computes activations: 01_cache_acts.py's way against a hook on the whole model and TransformerLens' early stop.

    python tests/bench/cache.py [--json FILE]

A GPT-NeoX of random weights, 8 layers, d_in 256, vocabulary 16,384; activations after layer 4 of 8 contexts of 128 tokens, as bfloat16. The
ways take turns. TransformerLens has a model of its own of the same sizes (it can't take random weights of a local configuration), so it
does the same work on other numbers; the other two are compared number by number. Both early stops run once more with weights in bfloat16
(01_cache_acts.py --model-dtype bfloat16). Figures: tokens per CPU second, medians over the turns, and ratios to the hook on the whole model.
"""
import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch  # noqa: E402
import transformers  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from sae import blocks_of, hook_point  # noqa: E402

cache_py = importlib.import_module("01_cache_acts")
LAYERS, LAYER, D_IN, HEADS, MLP, VOCAB, CONTEXTS, CTX, TURNS = 8, 3, 256, 4, 1024, 16_384, 8, 128, 9       # layer 3 is the fourth


def ours(model):
    source = cache_py.LanguageModel.__new__(cache_py.LanguageModel)             # its reading of text is not measured
    source.model, source.device, source.dtype, source.hook = model.base_model, torch.device("cpu"), "bfloat16", "resid_post"
    source.points = [hook_point(block, "resid_post", "bench") for block in blocks_of(source.model, LAYERS, "bench")]
    return lambda tokens: source.batch_activations(tokens, [LAYER])[LAYER]


def hook(model):
    block, found = blocks_of(model.base_model, LAYERS, "bench")[LAYER], []

    def run(tokens):
        handle = block.register_forward_hook(lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output))
        model(tokens)
        handle.remove()
        return found.pop().bfloat16()
    return run


def transformer_lens(dtype=torch.float32):
    model = HookedTransformer(HookedTransformerConfig(n_layers=LAYERS, d_model=D_IN, n_ctx=CTX, d_head=D_IN // HEADS, n_heads=HEADS, d_mlp=MLP, d_vocab=VOCAB,
                                                      act_fn="gelu", positional_embedding_type="rotary", rotary_dim=D_IN // HEADS // 4,
                                                      parallel_attn_mlp=True, seed=0, device="cpu", dtype=dtype))
    name = f"blocks.{LAYER}.hook_resid_post"
    return lambda tokens: model.run_with_cache(tokens, stop_at_layer=LAYER + 1, names_filter=name)[1][name].bfloat16()


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", help="write all figures here")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=D_IN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=MLP, max_position_embeddings=CTX)).eval()
    ways = {"ours": ours(model), "hook on the whole model": hook(model), "TransformerLens, stop_at_layer": transformer_lens(),
            "ours, bfloat16": ours(copy.deepcopy(model).bfloat16()), "TransformerLens, bfloat16": transformer_lens(torch.bfloat16)}
    tokens = torch.randint(VOCAB, (CONTEXTS, CTX))
    assert torch.equal(ways["ours"](tokens), ways["hook on the whole model"](tokens))
    seconds = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, run in ways.items():
            started = time.process_time()
            run(tokens)
            seconds[way].append(time.process_time() - started)
    result = {}
    for way, s in seconds.items():
        ratio = sorted(a / b for a, b in zip(seconds["hook on the whole model"][1:], s[1:]))
        result[way] = {"seconds": s, "ratio": ratio}
        print(f"{way:32} {CONTEXTS * CTX / statistics.median(s[1:]):8.0f} tokens/CPU s   x {statistics.median(ratio):.2f} ({ratio[0]:.2f}..{ratio[-1]:.2f})")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
