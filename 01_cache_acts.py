"""Cache the activations of a language model, for training sparse autoencoders on them.

    python 01_cache_acts.py                                                 # the embedded tiny model, its middle layer, its own text
    python 01_cache_acts.py --model google/gemma-2-2b --layer 19 --ctx 1024 --data monology/pile-uncopyrighted --tokens 500_000_000
    python 01_cache_acts.py --model EleutherAI/pythia-70m --layer 2 3 4 --data texts/
    python 01_cache_acts.py --model synthetic                               # activations whose true features are known
    python 01_cache_acts.py --model google/gemma-2-2b --data Skylion007/openwebtext --tokens 500_000_000 --ring 50GB    # more than the disk holds
    torchrun --nproc-per-node 8 01_cache_acts.py --model google/gemma-2-2b --data Skylion007/openwebtext                # a share on each GPU

Reads a causal language model (hub name or folder) and text (hub data set; .txt, .jsonl or .parquet file; or a folder of such files,
where a file val.* is the held-out part). Writes acts/NAME: train_*.safetensors (rows shuffled across the whole cache), val.safetensors
(held-out contexts in order) and meta.json. NAME is the last part of --model, with _mlp_out or _attn_out for these hooks, and with _l5 if
--layer is given. The same command goes on where an interrupted one stopped; a larger --tokens adds shards to a finished cache.
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C while libraries load just ends it; run_script() takes over
os.environ.setdefault("GOMP_SPINCOUNT", "1000")         # before torch loads: waiting threads that spin for long cost 2 to 5 x on a busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # machine, and those that sleep at once a fifth in 03_eval.py on an idle one

import argparse
import ast
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import shutil
import sysconfig
import time
import zlib
from collections import Counter
from itertools import accumulate, islice
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tokenizers
import torch
import transformers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from sae import (FORMAT, Parser, Refuse, blocks_of, check_name, files_checksum, generator, hook_point, hub_errors, language_model, loads,
                 model_checksum, number, pick_device, read_json, run_script, share, shorten, whole, write_file, write_json, write_tensors)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOOKS = ("resid_post", "mlp_out", "attn_out")


# ---- the embedded language model: text that every installation carries, and a small transformer trained on it ----------------------

TINY = Path("acts/tiny_lm")
RECIPE = dict(version=1, code_chars=800_000, doc_chars=1_300_000, doc_min=100, file_chars=16_000, spelling_words=3000, spelling_docs=2500,
              held_out=0.03, vocab=4096, tokenizer_chars=5_000_000, ctx=128, d_model=128, n_layers=3, n_heads=4, d_mlp=384,
              bigram_contexts=20_000, bigram_steps=40, bigram_lr=3e-2, steps=700, batch=8, lr=2e-3, embed_lr=5e-4, seed=0)
PACKAGES = ("stdlib", "numpy", "torch", "transformers", "sympy", "networkx")       # torch and transformers need the others
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}


def tiny_model():
    """(model folder, text folder) of the embedded model, built first if they are not there."""
    marker = TINY / "recipe.json"
    if not marker.exists() or read_json(marker)["recipe"] != RECIPE:
        with locked(TINY):
            build_tiny(marker)
    return str(TINY / "model"), str(TINY / "text")


def build_tiny(marker):
    """Text, tokenizer and model; the marker is written last, so that a build that was interrupted starts again."""
    print(f"building the embedded language model in {TINY}: once, a minute or two")
    train, val = split_text(corpus())
    for name, records in ("train", train), ("val", val):
        write_file(TINY / "text" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
    train, val = ([r["text"] for r in records] for records in (train, val))
    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(TINY / "model")
    tokens, held_out = (torch.tensor([c for c, _ in islice(contexts(texts, tokenizer, RECIPE["ctx"], True), n)])
                        for texts, n in ((train, RECIPE["bigram_contexts"]), (val, 512)))
    model, losses = train_tiny(tokens, held_out, tokenizer)
    print(f"embedded language model: {losses['loss']:.2f} nats per held-out token, a bigram model {losses['bigram_loss']:.2f}, "
          f"a unigram model {losses['unigram_loss']:.2f}")
    model.config.save_pretrained(TINY / "model")
    model.generation_config.save_pretrained(TINY / "model")
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_file(TINY / "model" / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write_json(marker, {"recipe": RECIPE, "documents": len(train), "threads": torch.get_num_threads(), "versions": versions(), **losses})


def corpus():
    """Records {text, package, module, kind} of the sources and docstrings of the installed packages, without exact duplicates."""
    from pydoc_data.topics import topics
    records = [dict(text=text, package="stdlib", module=f"pydoc_data.topics.{name}", kind="doc") for name, text in topics.items()]
    for package in tqdm(PACKAGES, desc="reading sources", unit="package"):
        left = {"code": RECIPE["code_chars"], "doc": RECIPE["doc_chars"]}
        for module, file in source_files(package):
            source = file.read_text(encoding="utf-8", errors="replace")
            code = [strip_licence(source)[:RECIPE["file_chars"]]] if left["code"] > 0 else []
            docs = docstrings(source) if left["doc"] > 0 else []
            left = {"code": left["code"] - sum(map(len, code)), "doc": left["doc"] - sum(map(len, docs))}
            found = [("code", text) for text in code] + [("doc", text) for text in docs]
            records += [dict(text=text, package=package, module=module, kind=kind) for kind, text in found]
            if max(left.values()) <= 0:
                break
    records = {record["text"]: record for record in records}.values()
    return list(records) + spelling(records)


def source_files(package):
    """(module, path) of the package's .py files, in an order that depends on the names alone and mixes its parts."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    elif spec := importlib.util.find_spec(package):
        root = Path(spec.submodule_search_locations[0])
    else:
        return []
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in LEFT_OUT]
        paths = [Path(folder, f).relative_to(root) for f in files if f.endswith(".py")]
        found += [(".".join([package, *path.with_suffix("").parts]), root / path) for path in paths]
    return sorted(found, key=lambda item: hashed(item[0]))


def strip_licence(source):
    """The source without the comment block at its top."""
    lines = source.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(lines[start:])


def docstrings(source):
    """The docstrings of a source text that are long enough to be read on their own."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):        # a template or a file for another Python: it has code but no docstrings
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [d for d in docs if d and len(d) >= RECIPE["doc_min"]]


def spelling(records):
    """Documents of lines `word has the first letter: W`, the prompt of the absorption evaluation, on the corpus' common words."""
    counts = Counter(word for r in records if r["kind"] == "doc" for word in re.findall(r"\b[A-Za-z]{2,12}\b", r["text"]))
    words = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:RECIPE["spelling_words"]]]
    rng = random.Random(RECIPE["seed"])
    documents = []
    for i in range(RECIPE["spelling_docs"]):
        module = f"spelling_{i}"
        mine = [w for w in words if is_held_out(w) == is_held_out(module)]       # held-out documents spell held-out words
        lines = [f"{rng.choice(['', ' '])}{w} has the first letter: {w[0].upper()}" for w in rng.sample(mine, 8)]
        documents.append(dict(text="\n".join(lines), package="spelling", module=module, kind="spelling"))
    return documents


def hashed(text):
    return xxhash.xxh3_64_intdigest(text.encode())


def is_held_out(module):
    return hashed(f"held out: {module}") % 10_000 < 10_000 * RECIPE["held_out"]


def split_text(records):
    """(training, held-out) records, split by module and mixed."""
    records = sorted(records, key=lambda r: hashed(r["text"]))
    return [r for r in records if not is_held_out(r["module"])], [r for r in records if is_held_out(r["module"])]


def train_tokenizer(texts):
    """Byte-level BPE; digits one by one; BOS at the start of each text, as the tokenizers of larger models have it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                            pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=RECIPE["vocab"], special_tokens=special, show_progress=False,
                                             initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    ends = accumulate(map(len, texts))
    bpe.train_from_iterator((t for t, end in zip(texts, ends) if end < RECIPE["tokenizer_chars"]), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                                model_max_length=RECIPE["ctx"], clean_up_tokenization_spaces=False)


def train_tiny(tokens, held_out, tokenizer):
    """(model, losses): a Llama-shaped transformer that starts as the best bigram model of its width, trained on contexts `tokens`."""
    R = RECIPE
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=R["d_model"], intermediate_size=R["d_mlp"], num_hidden_layers=R["n_layers"],
        num_attention_heads=R["n_heads"], max_position_embeddings=4 * R["ctx"], tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(R["seed"])
        model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:                    # a block adds nothing at first: the bigram fit is the whole model
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    unigram, bigram = count_models(tokens, config.vocab_size)
    fit_bigram(model, unigram, bigram)
    embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
    blocks = [*model.model.layers.parameters(), model.model.norm.weight]
    opt = torch.optim.AdamW([dict(params=embeddings, lr=R["embed_lr"]), dict(params=blocks, lr=R["lr"])], betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / R["steps"] / 0.03, (1 - step / R["steps"]) / 0.7, 1))
    bar = tqdm(range(R["steps"]), desc="training the language model", unit="step")
    for step in bar:
        x = tokens[step * R["batch"]:(step + 1) * R["batch"]]
        loss = backward(model.lm_head(model.model(x, use_cache=False).last_hidden_state[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    before, after = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    losses = {"loss": mean_loss(model.eval(), held_out), "bigram_loss": -bigram[before, after].log().mean().item(),
              "unigram_loss": -unigram[after].log().mean().item()}
    return model, losses


def count_models(tokens, vocab):
    """Unigram [vocab] and bigram [vocab, vocab] probabilities; the bigram backs off to the unigram by absolute discounting."""
    before, after = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    unigram = (torch.bincount(after, minlength=vocab) + 1.0) / (len(after) + vocab)
    pairs = torch.bincount(before * vocab + after, minlength=vocab ** 2).view(vocab, vocab).float()
    seen, discount = pairs.sum(1, keepdim=True), 0.75
    kinds = (pairs > 0).sum(1, keepdim=True)
    return unigram, torch.where(seen > 0, ((pairs - discount).clamp_min(0) + discount * kinds * unigram) / seen.clamp_min(1), unigram)


def fit_bigram(model, unigram, bigram):
    """Fit embedding, norm and unembedding to the whole bigram table: 40 steps do what hundreds of steps on text would."""
    E, U, steps = model.model.embed_tokens.weight, model.lm_head.weight, RECIPE["bigram_steps"]
    opt = torch.optim.Adam([E, U], lr=RECIPE["bigram_lr"], betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc="fitting it to bigrams", unit="step"):
        opt.param_groups[0]["lr"] = RECIPE["bigram_lr"] * min(1, (steps - step) / (0.7 * steps))
        logits = model.model.norm(E) @ U.T
        logits.backward(unigram[:, None] * (logits.detach().softmax(-1) - bigram))
        opt.step()
        model.zero_grad()


def backward(logits, targets):
    """Back-propagates the mean cross-entropy and returns it. By hand, because torch's own takes 28 % of a step on a CPU."""
    with torch.no_grad():
        grad = logits.softmax(-1)
        loss = -grad.gather(1, targets[:, None]).log().mean().item()
        grad.scatter_add_(1, targets[:, None], -torch.ones(len(grad), 1))
    logits.backward(grad / len(grad))
    return loss


@torch.no_grad()
def mean_loss(model, tokens):
    return sum(model(t, labels=t).loss.item() * len(t) for t in tokens.split(32)) / len(tokens)


# ---- the synthetic source: activations whose true features are known ----------------------------------------------------------------


class Synthetic:
    """Rows are sparse sums of known directions (sae_lens.synthetic): trees in which a parent fires whenever a child does and half of
    the parents have children that exclude each other, low-rank correlations, Zipf frequencies, more features than dimensions."""

    recipe = dict(n_features=320, d_in=96, trees=40, children=4, depth=1, exclusive=0.5, max_probability=0.6, min_probability=0.006,
                          zipf=1.0, magnitude_std=0.25, correlation=0.1)
    layers, ctx = [None], 1                   # a context is one row
    d_in = recipe["d_in"]

    def __init__(self, args):
        if args.layer or args.hook != "resid_post" or args.data:
            raise Refuse("--model synthetic has no layers, hooks or text: leave --layer, --hook and --data out", 2)
        self.seed, self.n_val = args.seed, args.val_tokens or 16_384
        if self.n_val > 10_000_000:                                              # they are held in memory
            raise Refuse(f"--val-tokens {self.n_val}: want at most 10_000_000 of synthetic data", 2)

    def settings(self, layer):
        model = dict(name="synthetic", architecture="sae_lens.synthetic", revision=importlib.metadata.version("sae_lens"), **self.recipe)
        return dict(source="synthetic", model=model, layer=None, hook=None, hook_name="synthetic", d_in=self.d_in, ctx=1, pack=False,
                    data={"name": "synthetic"}, val_tokens=self.n_val)

    @loads("sae_lens")
    def load(self):
        from sae_lens.synthetic import HierarchyConfig, LowRankCorrelationConfig, SyntheticModel, SyntheticModelConfig
        from sae_lens.synthetic import ZipfianFiringProbabilityConfig
        s = self.recipe
        self.model = SyntheticModel(SyntheticModelConfig(
            num_features=s["n_features"], hidden_dim=s["d_in"], bias=False, std_firing_magnitudes=s["magnitude_std"], seed=self.seed,
            firing_probability=ZipfianFiringProbabilityConfig(s["zipf"], s["max_probability"], s["min_probability"]),
            hierarchy=HierarchyConfig(s["trees"], s["children"], s["depth"], s["exclusive"], compensate_probabilities=True),
            correlation=LowRankCorrelationConfig(rank=16, correlation_scale=s["correlation"])))
        return {}

    def sample(self, rows, *key):
        """(activations, feature activations) that depend on the seed and the key alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, *key).initial_seed())
            return self.model.sample_with_features(rows)

    def held_out(self):
        acts, features = self.sample(self.n_val, "val")
        rate = (self.sample(100_000, "rate")[1] > 0).float().mean(0)              # the trees change the configured probabilities
        parent = torch.full((len(rate),), -1, dtype=torch.int32)
        nodes = list(self.model.hierarchy.roots)
        for node in nodes:                                                        # grows while it is walked
            nodes += node.children
            parent[[child.feature_index for child in node.children]] = node.feature_index
        truth = dict(dictionary=self.model.feature_dict.feature_vectors.detach(), probability=rate, parent=parent)
        return {"val": dict(acts=acts, features=features), "truth": truth}, None

    def stream(self, where):
        while True:
            yield None, None

    def rows(self, contexts, first, layers):
        n = len(contexts)
        rows = dict(acts=self.sample(n, "train", first)[0], tokens=torch.zeros(n, dtype=torch.int32),
                    context=torch.arange(first, first + n, dtype=torch.int32), position=torch.zeros(n, dtype=torch.int16))
        return [(rows, dict(bos=0, padding=0, outlier=0))]


# ---- text -> contexts ---------------------------------------------------------------------------------------------------------------


class Text:
    """The documents of a hub data set, a file or a folder, one string each; `description` goes into meta.json."""

    def __init__(self, args, data):
        self.name, self.column, self.path, self.trust = data, args.column, Path(data), args.trust_remote_code
        self.description = dict(name=data, column=args.column, split=args.split, **({"config": args.config} if args.config else {}))
        if self.path.exists():
            self.files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.suffix in READERS)
            if not self.files or self.files[0].suffix not in READERS:
                raise Refuse(f"--data {data}: want .txt, .jsonl or .parquet files, or a folder that holds some", 2)
            self.description |= dict(split=None, checksum=files_checksum(self.files))
        elif data.startswith((".", "/", "~")) or data.count("/") > 1 or self.path.suffix in READERS:
            raise Refuse(f"--data {data}: no such file or folder", 2)
        elif huggingface_hub.constants.HF_HUB_OFFLINE:                            # what `hf download --repo-type dataset` left in its cache
            with hub_errors("data set", data):
                snapshot = Path(huggingface_hub.snapshot_download(data, repo_type="dataset", local_files_only=True))
            there = sorted(p for p in snapshot.rglob("*") if p.suffix in READERS and p.stem.split("-")[0] == args.split)
            self.files = [p for p in there if not args.config or args.config in p.relative_to(snapshot).parts]
            if not self.files:
                raise Refuse(f"--data {data}: the hub's cache has no .txt, .jsonl or .parquet file of split {args.split}"
                             + (f" and config {args.config}" if args.config else "") + f" in {snapshot}", 4)
            self.description["revision"] = snapshot.name
        else:
            self.files = None
            with hub_errors("data set", data):
                self.description["revision"] = huggingface_hub.HfApi().dataset_info(data, timeout=10).sha
                huggingface_hub.HfApi().file_exists(data, "README.md", repo_type="dataset")      # said of what is gated as well, its files are not given

    def held_out_files(self):
        """The files named val.* of a folder."""
        return [p for p in self.files or [] if p.stem == "val" and len(self.files) > 1]

    def held_out(self):
        return self.read(self.held_out_files())

    def train(self):
        if self.files is None:
            return self.stream()
        return self.read([p for p in self.files if p not in self.held_out_files()])

    def read(self, files):
        for path in files:
            yield from READERS[path.suffix](path, self.column)

    def stream(self):
        import datasets
        with hub_errors("data set", self.name):
            records = datasets.load_dataset(self.name, self.description.get("config"), split=self.description["split"], revision=self.description["revision"],
                                            streaming=True, trust_remote_code=self.trust)
            for record in records:
                yield column_of(record, self.column, self.name)


def read_txt(path, column):
    """A .txt file, cut at line ends into documents of about 10,000 characters."""
    with open(path, encoding="utf-8", errors="replace") as f:
        while lines := f.readlines(10_000):
            yield "".join(lines)


def read_jsonl(path, column):
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as e:
                    raise Refuse(f"{path}, line {number}: not JSON") from e
                yield column_of(record, column, f"{path}, line {number}")


def read_parquet(path, column):
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise Refuse(f"{path}: not a parquet file") from e
    column_of(dict.fromkeys(file.schema_arrow.names, ""), column, path)
    for batch in file.iter_batches(batch_size=1000, columns=[column]):
        yield from (text or "" for text in batch.column(0).to_pylist())


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def column_of(record, column, where):
    """The text of a record; a record without text (null) is empty."""
    if not isinstance(record, dict) or column not in record:
        there = ", ".join(record) if isinstance(record, dict) else "no columns"
        raise Refuse(f"{where}: no column {column!r}, there are {there}: say which with --column", 2)
    if not isinstance(record[column], (str, type(None))):
        raise Refuse(f"{where}: column {column!r} holds {type(record[column]).__name__}, not text")
    return record[column] or ""


def contexts(documents, tokenizer, ctx, pack, where=(0, [], 0), group=64):
    """Yields (token ids, where): contexts of at most ctx tokens, and the place in the text at which the next one starts.

    Packed: documents one after another, with an EOS after each if the tokenizer has one, cut into full contexts; else one context a
    document. BOS stands first where the tokenizer puts it by itself."""
    start, rest, skip = where
    bos = starting_tokens(tokenizer)
    room = ctx - len(bos)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = islice(documents, start, None)
    while texts := list(islice(documents, group)):
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        tokens = rest + [t for i in ids if i for t in i + end] if pack else []
        made = [tokens[i:i + room] for i in range(0, len(tokens) - room + 1, room)] if pack else [i[:room] for i in ids if i]
        for n, context in enumerate(made[skip:], skip + 1):
            yield bos + context, (start, rest, n)
        start, rest, skip = start + len(texts), tokens[len(made) * room:] if pack else [], 0


def starting_tokens(tokenizer):
    """[BOS] if the tokenizer puts one before a text (Gemma, Llama), else [] (GPT-2, Pythia)."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


# ---- contexts -> activations --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by the hook on the deepest layer: what comes after it is not computed."""


class LanguageModel:
    """Rows are activations of a transformer at one or more layers, read by hooks."""

    def __init__(self, args):
        if args.model == "tiny":
            check_layers(args.layer or [], RECIPE["n_layers"], args.model)       # before it is built
        path, data = tiny_model() if args.model == "tiny" else (args.model, None)
        local = Path(path).exists()
        if local and not Path(path, "config.json").is_file():
            raise Refuse(f"--model {path}: the folder has no config.json, so it is not a model", 2)
        if not local and path.startswith((".", "/", "~")):
            raise Refuse(f"--model {path}: no such folder", 2)
        data = data if args.data is None else args.data
        if not data:
            raise Refuse(f"--model {args.model}: say which text with --data (hub name, file or folder)", 2)
        self.path, self.hook, self.ctx, self.pack, self.batch, self.device = path, args.hook, args.ctx, args.pack, args.batch, args.device
        self.dtype, self.model_dtype, self.name = args.dtype, args.model_dtype, args.model
        self.extra = dict(trust_remote_code=args.trust_remote_code)
        with hub_errors("model", path):
            self.config = transformers.AutoConfig.from_pretrained(path, **self.extra)
            if not local:
                self.extra["revision"] = self.config._commit_hash               # of all that is fetched from now on
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **self.extra)
        sizes = self.config.get_text_config()
        self.d_in, self.n_layers = sizes.hidden_size, sizes.num_hidden_layers
        self.layers = sorted(set(args.layer)) if args.layer else [self.n_layers // 2]
        check_layers(self.layers, self.n_layers, args.model)
        positions = getattr(sizes, "max_position_embeddings", None) or self.ctx
        if not 2 <= self.ctx <= min(positions, 32767):
            raise Refuse(f"--ctx {self.ctx}: want 2 to {min(positions, 32767)} for {args.model}", 2)
        self.text = Text(args, data)
        self.revision = model_checksum(path) if local else self.config._commit_hash
        self.val_tokens, self.n_val = args.val_tokens or 131_072, max(1, (args.val_tokens or 131_072) // self.ctx)
        if not self.text.held_out_files():
            self.n_val = max(1, min(self.n_val, args.tokens // 10 // self.ctx))
        special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id       # text begins or ends there: counted as `bos`
        self.special = torch.tensor([t for t in special if t is not None], dtype=torch.int32)

    def settings(self, layer):
        model = dict(name=self.name, path=self.path, revision=self.revision, architecture=(self.config.architectures or ["unknown"])[0],
                     n_layers=self.n_layers, dtype=self.model_dtype)
        return dict(source="model", model=model, layer=layer, hook=self.hook, hook_name=f"blocks.{layer}.hook_{self.hook}", d_in=self.d_in,
                    ctx=self.ctx, pack=self.pack, data=self.text.description, val_tokens=self.val_tokens)

    def load(self):
        """Load the weights; returns what is known of the model only then."""
        next(self.text.train(), None)                                            # a wrong column or split is said before weights are fetched
        with hub_errors("model", self.path):
            model = language_model(self.path, DTYPES[self.model_dtype], **self.extra)
        self.model = model.base_model.to(self.device).eval()
        self.points = [hook_point(block, self.hook, self.name) for block in blocks_of(self.model, self.n_layers, self.name)]
        return {"n_parameters": model.num_parameters()}

    def held_out(self):
        """(files, where): the held-out contexts, and where in the text the training part starts."""
        own = self.text.held_out_files()
        documents = self.text.held_out() if own else self.text.train()
        found = list(islice(contexts(documents, self.tokenizer, self.ctx, self.pack, group=1), self.n_val))
        where = (0, [], 0) if own or not found else (found[-1][1][0] + 1, [], 0)   # training starts at the document after the last one used
        if not found or next(self.stream(where), None) is None:
            raise Refuse(f"--data {self.text.name}: the text is shorter than one context of {self.ctx} tokens and one to hold out: "
                         f"give more text, or a smaller --ctx")
        tokens, mask, _ = self.block([context for context, _ in found])
        return {"val": dict(tokens=tokens, mask=mask)}, where

    def stream(self, where):
        return contexts(self.text.train(), self.tokenizer, self.ctx, self.pack, where)

    def block(self, found):
        """Contexts as (tokens [n, ctx] int32, mask [n, ctx] of the tokens that are rows, number of padding tokens)."""
        tokens = torch.full((len(found), self.ctx), self.tokenizer.pad_token_id or 0, dtype=torch.int32)
        text = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, context in enumerate(found):
            tokens[i, :len(context)] = torch.tensor(context, dtype=torch.int32)
            text[i, :len(context)] = True
        return tokens, text & ~torch.isin(tokens, self.special), int((~text).sum())

    def rows(self, found, first, layers):
        """For each layer (rows, dropped): the rows of contexts `found`, the first of which has number `first`."""
        tokens, mask, padding = self.block(found)
        context = torch.arange(first, first + len(found), dtype=torch.int32)[:, None].expand(tokens.shape)
        position = torch.arange(self.ctx, dtype=torch.int16).expand(tokens.shape)
        result = []
        for layer, acts in zip(layers, self.activations(tokens, layers)):
            kept = dict(acts=acts[mask], tokens=tokens[mask], context=context[mask], position=position[mask])
            norm = kept["acts"].float().norm(dim=-1)
            if not norm.isfinite().all():
                raise Refuse(f"activations of layer {layer} are not finite in {self.model_dtype}, kept as {self.dtype}: "
                             f"try --dtype bfloat16 or float32, and --model-dtype float32")
            usual = norm <= 10 * norm.median() if len(norm) else norm.bool()
            dropped = dict(bos=tokens.numel() - padding - int(mask.sum()), padding=padding, outlier=int((~usual).sum()))
            result.append(({k: v[usual] for k, v in kept.items()}, dropped))
        return result

    @torch.no_grad()
    def activations(self, tokens, layers):
        """Activations [n, ctx, d_in] at each of `layers`, in the dtype of the scratch files; stops after the deepest."""
        found, start = [], 0                                                     # a dict {layer: activations} of each batch
        while start < len(tokens):
            batch = self.batch_activations(tokens[start:start + self.batch], layers)
            if batch:
                found.append(batch)
                start += self.batch
            elif self.batch == 1:
                raise Refuse("out of memory with one context in a forward pass: try a smaller --ctx, or --model-dtype bfloat16", 4)
            else:
                self.batch //= 2
                torch.cuda.empty_cache()
                print(f"note: out of memory: going on with --batch {self.batch}")
        return [torch.cat([batch[layer] for batch in found]) for layer in layers]

    def batch_activations(self, tokens, layers):
        """{layer: activations} of one forward pass; None if the memory is too small for it."""
        found = {}
        handles = [self.points[layer].register_forward_hook(self.keep(found, layer, stop=layer == max(layers))) for layer in layers]
        try:
            with contextlib.suppress(Stop):
                self.model(tokens.long().to(self.device), use_cache=False)       # causal: padding at the end needs no mask
            return found
        except torch.OutOfMemoryError:
            return None                                                          # what it held is freed only once this frame is left
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, found, layer, stop):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            found[layer] = output.to(stored_dtype(self.dtype)).cpu()
            if stop:
                raise Stop
        return hook


def check_layers(layers, n_layers, name):
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise Refuse(f"--layer {shorten(str(layer))}: {name} has layers 0 to {n_layers - 1}", 2)


# ---- rows -> shuffled shards --------------------------------------------------------------------------------------------------------
#
# Every row is appended to one of as many scratch files as there will be shards, drawn at random; then each scratch file is permuted and
# written as a shard. That is an exact shuffle of the whole cache, with one part in memory at a time. progress.json is written after each
# part; what a killed run left beyond it is cut off.
#
# With --window the text is cached a window after the other, each shuffled like that, and shards have exactly --rows-per-shard rows, so that
# --tokens says beforehand how many there will be. With --ring shards that 02_train.py has read and deleted make room for the next window:
# two windows are on the disk, one being read and one being written. A cache that keeps its shards (--window alone) holds the same bytes.


class Cache:
    """A folder acts/NAME being written."""

    def __init__(self, folder, settings, layer, args):
        self.folder, self.layer, self.tokens, self.scratch = folder, layer, args.tokens, folder / "scratch"
        self.settings = {"format": FORMAT, **settings, "dtype": args.dtype, "rows_per_shard": args.rows_per_shard, "seed": args.seed,
                         "window": None, "ring": None}
        self.rank, self.processes = args.rank, args.processes
        self.per_part = max(1, args.rows_per_shard // settings["ctx"])            # contexts of a part
        self.stored = stored_dtype(args.dtype)
        self.width = settings["d_in"] * self.stored.itemsize + 10                 # bytes of a row: acts, tokens, context, position
        self.window = args.window
        if args.window or args.ring:
            self.plan_windows(args)

    def plan_windows(self, args):
        """Settings of a cache in windows: tokens of a window, bytes of the ring, and the shards that there will be."""
        shard, promised = args.rows_per_shard, self.tokens // args.rows_per_shard
        fits = int(args.ring // (shard * self.width) - 3) // 2 if args.ring else promised + 1     # 2 windows, the first shard, and what is being written
        if args.ring and (fits < 1 or args.window and args.window > fits * shard):
            raise Refuse(f"--ring: want at least two windows and three shards, {(2 * max(args.window or 0, shard) + 3 * shard) * self.width / 1e9:.3g} GB, "
                         "or a smaller --window or --rows-per-shard", 2)
        if promised < 1:
            raise Refuse(f"--tokens {self.tokens}: in windows it counts rows, and fills no shard of {shard}: want a smaller --rows-per-shard", 2)
        tokens = args.window or min(fits, promised + 1) * shard                   # a shard more than is wanted: some tokens are no rows
        self.window = max(1, tokens // self.settings["ctx"]) * self.settings["ctx"]
        self.settings |= dict(window=self.window, ring=args.ring, promised=promised)

    def open(self):
        """Read what is there; returns whether anything is left to do."""
        for leftover in [*self.folder.glob(".*.tmp"), *self.scratch.glob(".*.tmp")]:
            leftover.unlink()
        there = [(p if p.exists() else None) for p in (self.folder / "meta.json", self.scratch / "progress.json")]
        self.meta, self.progress = (path and read_json(path) for path in there)
        if not self.meta or not (self.meta["complete"] or self.meta["shards"] or self.progress and self.progress["contexts"]):
            self.meta = self.progress = None                                     # nothing yet that would be worth going on with
            return True
        self.check()
        if self.progress and self.progress["contexts"] <= self.meta.get("contexts", -1):
            self.progress = None                                                 # killed when its shards were listed already
        if self.meta["complete"] and self.meta["tokens"] >= self.tokens:
            for leftover in [self.scratch, *self.folder.glob("process_*")]:
                shutil.rmtree(leftover, ignore_errors=True)
            print(f"{self.folder} is complete: {self.meta['rows']:,} rows, {self.meta['tokens']:,} tokens were asked for")
            return False
        if self.progress:
            self.cut_back()
        return True

    def divide(self):
        """Several processes (torchrun): each makes a part, a cache of its own in a folder of its own, from the contexts that are its share."""
        self.folder = self.folder / f"process_{self.rank}"
        self.scratch = self.folder / "scratch"
        return self.folder

    def is_complete(self):
        return (self.folder / "meta.json").exists() and read_json(self.folder / "meta.json")["complete"]

    def check(self):
        """Refuse to go on with other settings than the folder was made with, or if one of its files is not there."""
        for key, want in json.loads(json.dumps(self.settings)).items():
            have = self.meta.get(key)
            if isinstance(want, dict):
                key, have, want = next(((f"{key} {k}", have.get(k), want[k]) for k in want if have.get(k) != want[k]), (key, None, None))
            if have != want:
                raise Refuse(f"{self.folder} was made with {key} {have}, not {want}: give another --name, or delete that folder", 2)
        if self.window and self.meta["tokens"] != self.tokens or self.meta.get("processes", 1) > 1 and self.meta["tokens"] < self.tokens:
            raise Refuse(f"{self.folder} was made with --tokens {self.meta['tokens']}, and one that was made in windows or by several processes "
                         "can't be extended: give another --name", 2)
        if self.progress and self.progress["tokens"] != self.tokens:
            raise Refuse(f"{self.folder} was interrupted on its way to --tokens {self.progress['tokens']}: finish that first", 2)
        for entry in self.meta["shards"]:
            path = self.folder / entry["file"]
            if not path.exists() and self.settings.get("ring"):
                continue                                                         # read by 02_train.py and deleted
            if not path.exists() or path.stat().st_size != entry["bytes"]:
                raise Refuse(f"{path} is missing or cut short: delete {self.folder} and cache again")

    def cut_back(self):
        """Cut off what was appended to the scratch files after the last progress was written."""
        for i, length in enumerate(self.progress["lengths"]):
            if i >= self.progress["next"] and length:
                path = self.bucket(i)
                if not path.exists() or path.stat().st_size < length:
                    raise Refuse(f"{path} is missing or cut short: delete {self.scratch} and run the same command again")
                os.truncate(path, length)

    def begin(self, source, known):
        """Start a part of the cache: the whole, or what a larger --tokens adds. known: what loading the model told."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.meta and self.settings.get("ring"):
            self.wait_for_room()
        contexts, where, sums = 0, None, dict(rows=0, norm=0.0, square=0.0, vector=[0.0] * self.settings["d_in"])
        if self.meta:
            contexts, where, sums = self.meta["contexts"], self.meta["where"], self.meta["sums"]
        else:
            files, where = source.held_out()
            held = {}
            for name, tensors in files.items():
                said = write_tensors(self.folder / f"{name}.safetensors", tensors)
                held[name] = {"file": f"{name}.safetensors", "checksum": said}
            held["val"]["contexts"] = len(next(iter(files["val"].values())))
            self.settings["model"] |= known
            self.meta = {**self.settings, "tokens": self.tokens, "complete": False, "rows": 0, "shards": [], **held,
                         "dropped": dict(bos=0, padding=0, outlier=0), "versions": versions()}
            write_json(self.folder / "meta.json", self.meta)
        n = self.n_buckets(contexts)
        self.progress = dict(tokens=self.tokens, start=contexts, contexts=contexts, where=where, dropped=self.meta["dropped"], sums=sums,
                             lengths=[0] * n, crcs=[0] * n, next=0, shards=[])
        self.save()

    def end(self):
        """The context at which the cache ends, or the window that is being made."""
        return (self.progress["start"] * self.settings["ctx"] + self.window if self.window else self.tokens) // self.settings["ctx"]

    def left(self):
        """Contexts still to be run, by this process; in windows about."""
        done = (self.progress or self.meta or {"contexts": 0})["contexts"]
        return max(0, self.tokens // self.settings["ctx"] - done) // self.processes

    def n_buckets(self, start):
        rows = self.window or (self.tokens // self.settings["ctx"] - start) * self.settings["ctx"] // self.processes
        return max(1, -(-rows // self.settings["rows_per_shard"]))

    def wait_for_room(self):
        """Until shards have been read and deleted, so that another window fits into the ring."""
        said, largest = False, self.window + 3 * self.settings["rows_per_shard"]          # rows: a window, what is being written, the first shard
        while sum(e["rows"] for e in self.meta["shards"][1:] if (self.folder / e["file"]).exists()) + largest > self.settings["ring"] / self.width:
            if not said:
                tqdm.write(f"{self.folder}: the ring is full, waiting for 02_train.py to read it")
            said = True
            time.sleep(0.2)

    def bucket(self, i):
        return self.scratch / f"{i:05d}.raw"

    def save(self):
        write_json(self.scratch / "progress.json", self.progress)

    def append(self, first, count, rows, dropped, where):
        """Spread the rows of contexts first .. first + count over the scratch files."""
        progress = self.progress
        if first < progress["contexts"]:
            return                                                               # this layer was a part ahead of another when killed
        if rows is None:                                                         # another process' share
            progress["contexts"], progress["where"] = first + count, where
            return
        n, buckets, rows = len(rows["acts"]), len(progress["lengths"]), {**rows, "acts": rows["acts"].to(self.stored)}
        raw = torch.cat([v.contiguous().view(n, -1).view(torch.uint8) for v in rows.values()], 1) if n else torch.zeros(0, self.width)
        draw = torch.randint(buckets, (n,), generator=generator(self.settings["seed"], "bucket", first))
        order, counts = draw.argsort(stable=True), torch.bincount(draw, minlength=buckets).tolist()
        for i, part in enumerate(raw[order].split(counts)):
            if len(part):
                data = part.numpy().tobytes()
                with disk_errors(self.bucket(i)), open(self.bucket(i), "ab") as f:
                    f.write(data)
                progress["lengths"][i] += len(data)
                progress["crcs"][i] = zlib.crc32(data, progress["crcs"][i])
        progress["dropped"] = {k: progress["dropped"][k] + v for k, v in dropped.items()}
        progress["contexts"], progress["where"] = first + count, where
        self.save()

    def finish(self):
        """Turn the scratch files into shards, list them in meta.json, and remove what is not needed any more."""
        progress, n = self.progress, len(self.progress["lengths"])
        rows = sum(progress["lengths"]) // self.width
        per = max(1, n * self.settings["rows_per_shard"] // max(1, rows))        # scratch files to a shard: several if the text ended early
        parts = [i for i in range(0, n, per) if any(progress["lengths"][i:i + per])]
        for i in tqdm([i for i in parts if i >= progress["next"]], desc=f"shuffling {self.folder.name}", unit="shard", disable=self.rank > 0):
            full = [k for k in range(i, min(i + per, n)) if progress["lengths"][k]]
            buckets = [self.bucket(k) for k in full]
            carried = self.scratch / f"carried_{parts.index(i):05d}.raw"         # in a window: what the part before left
            self.write_shards(buckets, i, [progress["crcs"][k] for k in full], carried, self.scratch / f"carried_{parts.index(i) + 1:05d}.raw")
            progress["next"] = i + per
            self.save()
            for file in buckets + [carried]:
                file.unlink(missing_ok=True)
        sums, shards = self.progress["sums"], self.meta.pop("shards") + self.progress["shards"]
        if not sums["rows"]:
            raise Refuse(f"{self.folder}: no rows, the text has only special tokens: delete that folder and give other text" if not self.window else
                         f"{self.folder}: a window has fewer rows than a shard: delete that folder, give a larger --window or smaller --rows-per-shard")
        measured = {} if self.window and "scale" in self.meta else statistics(sums)      # the first window's: training has begun with them
        ended = self.progress["contexts"] < self.end()                           # the text did
        self.meta |= dict(complete=not self.window or ended or len(shards) == self.settings["promised"], tokens=self.tokens,
                          contexts=self.progress["contexts"], rows=sums["rows"], dropped=self.progress["dropped"], shards=shards,
                          where=self.progress["where"], sums=sums, **measured)
        write_json(self.folder / "meta.json", self.meta)
        shutil.rmtree(self.scratch)
        self.progress = None
        if not self.meta["complete"]:
            return
        print(f"{self.folder}: {sums['rows']:,} rows of {self.settings['d_in']} in {len(shards)} shards, mean norm {self.meta['mean_norm']:.3g}, "
              f"gamma {self.meta['gamma']:.2f}, dropped {self.meta['dropped']}")

    def write_shards(self, buckets, i, crcs, carried, carry):
        """The rows of some scratch files as a shard; in a window, after those `carried` over, as shards of exactly --rows-per-shard."""
        parts = [bucket.read_bytes() for bucket in buckets]
        for bucket, part, crc in zip(buckets, parts, crcs):
            if zlib.crc32(part) != crc:
                raise Refuse(f"{bucket} is damaged (its checksum differs): delete {self.scratch} and run the same command again")
        raw = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).view(-1, self.width)
        raw = raw[torch.randperm(len(raw), generator=generator(self.settings["seed"], "shuffle", self.progress["start"], i))]
        if not self.window:
            return self.write_shard(raw)
        if before := carried.read_bytes() if carried.exists() else b"":
            raw = torch.cat([torch.frombuffer(bytearray(before), dtype=torch.uint8).view(-1, self.width), raw])
        size = self.settings["rows_per_shard"]
        missing = self.settings["promised"] - len(self.meta["shards"]) - len(self.progress["shards"])
        for n in range(min(len(raw) // size, missing)):
            self.write_shard(raw[n * size:(n + 1) * size])
        write_file(carry, raw[len(raw) // size * size:].numpy().tobytes())

    def write_shard(self, raw):
        columns = [c.clone(memory_format=torch.contiguous_format) for c in raw.split([self.width - 10, 4, 4, 2], 1)]
        acts = columns[0].view(self.stored)
        tensors = {"acts": acts, "tokens": columns[1].view(torch.int32)[:, 0], "context": columns[2].view(torch.int32)[:, 0],
                   "position": columns[3].view(torch.int16)[:, 0]}
        if self.settings["dtype"] == "int8":
            tensors |= to_int8(acts.float())
            acts = from_int8(tensors)
        file = f"train_{len(self.meta['shards']) + len(self.progress['shards']):05d}.safetensors"
        said = write_tensors(self.folder / file, tensors)
        self.progress["shards"].append({"file": file, "rows": len(acts), "bytes": (self.folder / file).stat().st_size, "checksum": said,
                                        **({"window": self.progress["start"]} if self.window else {})})
        exact, sums = acts.double(), self.progress["sums"]
        self.progress["sums"] = dict(rows=sums["rows"] + len(acts), norm=sums["norm"] + exact.norm(dim=-1).sum().item(),
                                     square=sums["square"] + exact.square().sum().item(),
                                     vector=(torch.tensor(sums["vector"], dtype=torch.float64) + exact.sum(0)).tolist())


def statistics(sums):
    """What meta.json says of the rows, from their summed norms, squares and vectors."""
    mean = torch.tensor(sums["vector"], dtype=torch.float64) / sums["rows"]
    mean_norm, square = sums["norm"] / sums["rows"], mean.square().sum().item()
    variance = max(sums["square"] / sums["rows"] - square, 1e-30)                # 0 up to rounding if all rows are equal
    return dict(mean_norm=mean_norm, scale=len(mean) ** 0.5 / mean_norm, gamma=(square / variance) ** 0.5)


def join(folder, processes):
    """One cache of the parts that several processes made: their shards in turn. Waits for them; killed, it can be done again."""
    parts = [folder / f"process_{rank}" for rank in range(processes)]
    if not parts[0].exists():
        return                                                                   # joined before
    while not all((p / "meta.json").exists() and read_json(p / "meta.json")["complete"] for p in parts):
        time.sleep(0.2)                                                          # torchrun stops all when one fails
    for part in parts[1:]:
        with locked(part, wait=True):                                            # its process still tidies up
            pass
    metas, shards = [read_json(p / "meta.json") for p in parts], []
    for part, entry in [(p, m["shards"][i]) for i in range(max(len(m["shards"]) for m in metas)) for p, m in zip(parts, metas) if i < len(m["shards"])]:
        file = f"train_{len(shards):05d}.safetensors"
        if (part / entry["file"]).exists():
            os.replace(part / entry["file"], folder / file)
        shards.append({**entry, "file": file})
    if (parts[0] / metas[0]["val"]["file"]).exists():
        os.replace(parts[0] / metas[0]["val"]["file"], folder / metas[0]["val"]["file"])
    sums = {key: sum(m["sums"][key] for m in metas) for key in ("rows", "norm", "square")}
    sums["vector"] = [sum(values) for values in zip(*(m["sums"]["vector"] for m in metas))]
    dropped = {key: sum(m["dropped"][key] for m in metas) for key in metas[0]["dropped"]}
    write_json(folder / "meta.json", {**metas[0], "processes": processes, "rows": sums["rows"], "contexts": max(m["contexts"] for m in metas),
                                      "dropped": dropped, "shards": shards, "sums": sums, **statistics(sums)})
    for part in parts:
        shutil.rmtree(part)
    print(f"{folder}: {sums['rows']:,} rows in {len(shards)} shards, by {processes} processes")


def stored_dtype(name):
    """What scratch files hold; int8 is made from bfloat16 when a shard is written."""
    return torch.bfloat16 if name == "int8" else DTYPES[name]


def to_int8(acts):
    """Each dimension standardised over the shard, then each row scaled to -127 .. 127."""
    mean, std = acts.mean(0), acts.std(0).clamp_min(1e-12)
    scaled = (acts - mean) / std
    row_scale = scaled.abs().amax(1).clamp_min(1e-12) / 127
    return {"acts": (scaled / row_scale[:, None]).round().to(torch.int8), "row_scale": row_scale, "dim_mean": mean, "dim_std": std}


def from_int8(shard):
    return shard["acts"] * shard["row_scale"][:, None] * shard["dim_std"] + shard["dim_mean"]


@contextlib.contextmanager
def disk_errors(path):
    try:
        yield
    except OSError as e:
        raise Refuse(f"cannot write {path}: {e.strerror}: make room or choose another place, then run the same command again", 4) from e


@contextlib.contextmanager
def locked(folder, wait=False):
    """Make the folder and hold it against a second process, also one that is killed; an empty folder is not left behind. wait: for whoever
    holds it; without, Refuse."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise BlockingIOError                                                # whoever held it has just removed it
    except BlockingIOError:
        os.close(descriptor)
        raise Refuse(f"{folder} is being written by another process: wait for it", 6) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()                                                       # only if empty, and only by who holds it
        os.close(descriptor)


def versions():
    packages = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}


# ---- main ---------------------------------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    huggingface_hub.utils.logging.set_verbosity_error()                          # its retries; how they end is said by hub_errors
    source = Synthetic(args) if args.model == "synthetic" else LanguageModel(args)
    places = folders(args, source.layers)
    with contextlib.ExitStack() as held:
        for place in places if args.rank == 0 else []:
            held.enter_context(locked(place))
        args.ring = args.ring and args.ring // len(places)
        caches = [Cache(place, source.settings(layer), layer, args) for place, layer in zip(places, source.layers)]
        caches = [c for c in caches if c.open()]
        for cache in caches:
            if cache.meta if args.processes > 1 else any(cache.folder.glob("process_*")):
                raise Refuse(f"{cache.folder} was begun by another number of processes: go on with as many, or delete that folder", 2)
        if args.processes > 1:
            for cache in caches:
                held.enter_context(locked(cache.divide()))
            caches = [c for c in caches if not c.is_complete() and c.open()]
        if cache_all(source, caches, args.estimate) and args.processes > 1 and args.rank == 0:
            for place in places:
                join(place, args.processes)


def cache_all(source, caches, estimate):
    """Fill the caches; returns whether they are there now."""
    if not caches:
        return True
    known = source.load()
    if caches[0].rank == 0:
        announce(source, caches)
    if estimate:
        return False
    stream = None
    while caches:                                                                # once; with --window once a window
        for cache in caches:
            if not cache.progress:
                cache.begin(source, known)
        for start in sorted({c.progress["start"] for c in caches}):              # all at 0, unless one of several layers is extended
            stream = fill(source, [c for c in caches if c.progress["start"] == start], stream)
        for cache in caches:
            cache.finish()
        caches = [c for c in caches if not c.meta["complete"]]
    return True


def fill(source, caches, going=None):
    """Run the contexts that are still missing through the model and append their rows; one pass for all caches. `going`, and what is
    returned: a place in the text and the stream of contexts that stands there, which the next window goes on with."""
    cache = min(caches, key=lambda c: c.progress["contexts"])
    first, end, where, rank, processes = cache.progress["contexts"], cache.end(), cache.progress["where"], cache.rank, cache.processes
    stream = going[1] if going and going[0] == where else source.stream(where)
    with tqdm(total=end * source.ctx, initial=first * source.ctx, desc="caching", unit="tokens", unit_scale=True, disable=rank > 0) as bar:
        while first < end and all(c.progress["next"] == 0 for c in caches):
            part = list(islice(stream, min(cache.per_part, end - first)))
            if not part:
                break
            where, mine = part[-1][1], first // cache.per_part % processes == rank     # processes take the parts in turn
            found = source.rows([c for c, _ in part], first, [c.layer for c in caches]) if mine else [(None, None)] * len(caches)
            for cache, (rows, dropped) in zip(caches, found):
                cache.append(first, len(part), rows, dropped, where)
            first += len(part)
            bar.update(len(part) * source.ctx)
    if first < end and rank == 0:
        print(f"note: the text ends after {first * source.ctx:,} tokens, {caches[0].tokens:,} were asked for")
    return where, stream


def announce(source, caches):
    """Say what will be written and how long it may take; refuse if the disk can't hold it."""
    need = 0
    for cache in caches:
        shard, rows = cache.settings["rows_per_shard"], cache.left() * source.ctx * cache.processes
        if cache.window:
            rows = min(cache.settings["promised"] * shard, int((cache.settings["ring"] or 1e30) / cache.width))
        need += rows * cache.width + (0 if cache.settings["ring"] else (cache.window or shard) * cache.width)      # scratch goes after its shard is there
        print(f"{cache.folder}: up to {rows:,} rows of {source.d_in} {cache.settings['dtype']}, {rows * cache.width / 1e6:,.0f} MB"
              + (f" at a time, {cache.settings['promised'] * shard:,} in all" if cache.settings["ring"] else ""))
    seconds = seconds_per_context(source, [c.layer for c in caches]) * max(c.left() for c in caches)
    free = shutil.disk_usage(caches[0].folder).free
    print(f"about {seconds:,.0f} s, measured on a few contexts; the disk has {free / 1e9:,.1f} GB free")
    if need > free:
        raise Refuse(f"the disk of {caches[0].folder} has {free / 1e9:,.2f} GB free, {need / 1e9:,.2f} are needed: "
                     f"make room, or ask for fewer --tokens", 4)


def seconds_per_context(source, layers):
    """Measured on a few contexts, the second time (the first one warms up)."""
    on_cpu = source.ctx > 1 and source.device.type == "cpu"                           # where a whole batch would take minutes, and is no faster
    held = [[0] * source.ctx] * (max(1, min(source.batch, 512 // source.ctx)) if on_cpu else source.batch) if source.ctx > 1 else range(4096)
    for _ in range(2):
        start = time.perf_counter()
        source.rows(held, 0, layers)
    return (time.perf_counter() - start) / len(held)


def folders(args, layers):
    """Where each layer goes."""
    short = args.name if args.name is not None else args.model.rstrip("/").split("/")[-1] + ("" if args.hook == "resid_post" else f"_{args.hook}")
    check_name("--name", short)
    numbered = len(layers) > 1 or (args.layer and not args.name)
    return [Path("acts") / (f"{short}_l{layer}" if numbered else short) for layer in layers]


def parse_args():
    p = Parser(__doc__)
    p.add_argument("--model", default="tiny", help="tiny (embedded), synthetic, a name on the Hugging Face hub, or a folder")
    p.add_argument("--layer", type=int, nargs="+", help="decoder layers, from 0; a folder each, one pass (default: the middle one)")
    p.add_argument("--hook", type=one_of("--hook", HOOKS), default="resid_post", help="resid_post, mlp_out or attn_out of the layer")
    p.add_argument("--data", help="text: hub data set, .txt .jsonl .parquet file, or folder (default with tiny: its own text)")
    p.add_argument("--column", default="text", help="column of the data that holds the text")
    p.add_argument("--split", default="train", help="split of a hub data set")
    p.add_argument("--config", help="configuration of a hub data set that has several, such as wikitext-103-raw-v1")
    p.add_argument("--tokens", type=whole, default=1_000_000, help="tokens to run through the model; synthetic: rows (default: 1_000_000)")
    p.add_argument("--val-tokens", type=whole, help="held-out tokens (default 131_072; at most a tenth of --tokens if they "
                   "are taken from the same text; synthetic: 16_384 rows)")
    p.add_argument("--ctx", type=whole, default=128, help="tokens in a context")
    p.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True, help="documents in a row, or one a context")
    p.add_argument("--dtype", type=one_of("--dtype", [*DTYPES, "int8"]), default="bfloat16", help="on disk; or float16, float32, int8")
    p.add_argument("--model-dtype", type=one_of("--model-dtype", DTYPES), help="computing (default: float32 on a CPU, else bfloat16)")
    p.add_argument("--name", help="folder under acts/ (default: see above)")
    p.add_argument("--batch", type=whole, default=32, help="contexts in a forward pass")
    p.add_argument("--rows-per-shard", type=whole, default=65_536, help="about; drawn at random")
    p.add_argument("--window", type=whole, help="tokens that are shuffled together (default: all); --tokens then counts rows")
    p.add_argument("--ring", type=size, help="disk that shards may take, such as 50GB: 02_train.py reads them meanwhile and deletes them")
    p.add_argument("--seed", type=number, default=0, help="of the shuffle and of synthetic data")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model or data set")
    p.add_argument("--estimate", action="store_true", help="say what it will take, and stop")
    args = p.parse_args()
    args.rank, args.processes = share()
    if args.processes > 1 and (args.window or args.ring or args.model in ("tiny", "synthetic")):
        raise Refuse("several processes (torchrun) share the contexts of a language model and data that you name, without --window or --ring", 2)
    for flag, value in (("--model", args.model), ("--data", args.data or "")):
        if max(map(len, value.split("/"))) > 255 or not value.isprintable():     # which no file system or hub has
            raise Refuse(f"{flag} {shorten(value)!r}: too long for a name, or not one", 2)
    if args.name is not None:                                                    # told before the model is looked for
        check_name("--name", args.name)
    args.device = pick_device(args.device)
    args.model_dtype = args.model_dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    return args


def one_of(flag, names):
    def parse(text):
        if text not in names:
            raise Refuse(f"{flag} {shorten(text)}: want one of {', '.join(names)}", 2)
        return text
    return parse


def size(text):
    """'50GB' -> bytes."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", text, re.ASCII)):
        raise Refuse(f"--ring {text}: want a size such as 50GB", 2)
    return int(float(found[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[found[2]])


if __name__ == "__main__":
    run_script(main)
