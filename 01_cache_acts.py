"""Cache the activations of a language model, for training sparse autoencoders on them.

    python 01_cache_acts.py                              # the embedded tiny model on its own text
    python 01_cache_acts.py --model EleutherAI/pythia-70m --layer 2 3 4 --data texts/
    python 01_cache_acts.py --model google/gemma-2-2b --layer 19 --ctx 1024 \\
        --data monology/pile-uncopyrighted --tokens 500_000_000
    python 01_cache_acts.py --model synthetic            # activations whose true features are known
    torchrun --nproc-per-node 8 01_cache_acts.py --model google/gemma-2-2b --data texts/

Reads a causal language model (hub name, folder or .gguf file) and text: a hub data set, a file
(.txt, .jsonl, .json, .parquet, .csv, also compressed), or a folder of such files, in which a file
val.* is the held-out part. Writes acts/NAME: train_*.safetensors (rows shuffled across the whole
cache), val.safetensors (held-out contexts in order) and meta.json. The same command goes on where
an interrupted one stopped.
"""
import ast
import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import sysconfig
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path

import fsspec
import huggingface_hub
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from sae import (FORMAT, Parser, Refuse, check_name, decoder_layers, files_checksum, generator,
                 hook_point, hub_errors, language_model, lock, model_checksum, model_config,
                 model_tokenizer, natural, pick_device, positive_int, ranks, read_json,
                 read_tensors, run_script, write_file, write_json, write_tensors)

DTYPES = ("bfloat16", "float16", "float32")
HOOKS = ("resid_post", "mlp_out", "attn_out")


def parse_args():
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", default="tiny",
        help="tiny (embedded), synthetic, a hub name, a folder or a .gguf file")
    add("--layer", type=natural, nargs="+",
        help="decoder layers, from 0; a folder each, one pass (default: the middle one)")
    add("--hook", choices=HOOKS, default="resid_post")
    add("--data", help="text: hub data set, file or folder (default for tiny: its own)")
    add("--column", default="text", help="column of the data that holds the text")
    add("--split", default="train", help="split of the data")
    add("--config", help="configuration of a data set that has several")
    add("--tokens", type=positive_int, default=300_000,
        help="tokens to run through the model; rows of synthetic (default: 300_000)")
    add("--val-tokens", type=positive_int, default=16_384,
        help="held-out tokens (default: 16_384; at most a tenth of the same text)")
    add("--ctx", type=positive_int, default=128, help="tokens in a context")
    add("--no-pack", dest="pack", action="store_false",
        help="one document a context, instead of one after another")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the cached activations")
    add("--model-dtype", choices=DTYPES,
        help="of the model (default: float32 on a CPU, else bfloat16)")
    add("--name", help="folder under acts/ (default: from --model, --hook and --layer)")
    add("--batch", type=positive_int, default=32, help="contexts in a forward pass")
    add("--rows-per-shard", type=positive_int, default=65_536, help="on average")
    add("--seed", type=natural, default=0, help="of the shuffle and of synthetic data")
    add("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    add("--trust-remote-code", action="store_true",
        help="run code that comes with the model or data, and read its pickle files")
    args = p.parse_args()
    if args.name is not None:
        check_name("--name", args.name)
    args.device = pick_device(args.device)
    default = "float32" if args.device.type == "cpu" else "bfloat16"
    args.model_dtype = args.model_dtype or default
    return args


# ---- the embedded language model, trained on text that every installation carries ----------------


TINY = Path("acts/tiny_lm")
RECIPE = dict(
    version=1, code_chars=800_000, doc_chars=1_300_000, doc_min=100, file_chars=16_000,
    spelling_words=3000, spelling_docs=2500, held_out=0.03, vocab=4096, tokenizer_chars=5_000_000,
    ctx=128, d_model=128, n_layers=3, n_heads=4, d_mlp=384, bigram_contexts=20_000, bigram_steps=40,
    bigram_lr=3e-2, steps=700, batch=8, lr=2e-3, embed_lr=5e-4, seed=0)
PACKAGES = ("stdlib", "numpy", "torch", "transformers", "sympy", "networkx")  # torch needs the last
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3",
            "pydoc_data", "__pycache__"}


def tiny_model():
    """(model folder, text folder) of the embedded model, built first if it is not there."""
    marker = TINY / "recipe.json"
    with lock(TINY, wait=True):
        if not marker.exists() or read_json(marker)["recipe"] != RECIPE:
            build_tiny(marker)
    return str(TINY / "model"), str(TINY / "text")


def build_tiny(marker):
    """Make text, tokenizer and model. The marker comes last: a build that stopped starts again."""
    print(f"building the embedded language model in {TINY}: once, a minute or two")
    train, val = split_text(corpus())
    for name, records in ("train", train), ("val", val):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(TINY / "text" / f"{name}.jsonl", lines.encode())
    tokenizer = train_tokenizer([record["text"] for record in train])
    tokenizer.save_pretrained(TINY / "model")

    def tokens_of(records, n):
        found = contexts((r["text"] for r in records), tokenizer, RECIPE["ctx"], pack=True)
        return torch.tensor([context for _, context in islice(found, n)])

    tokens, held_out = tokens_of(train, RECIPE["bigram_contexts"]), tokens_of(val, 512)
    model, losses = train_tiny(tokens, held_out, tokenizer)
    print("embedded language model: {loss:.2f} nats per held-out token, a bigram model "
          "{bigram_loss:.2f}, a unigram model {unigram_loss:.2f}".format(**losses))
    model.save_pretrained(TINY / "model")
    write_json(marker, {"recipe": RECIPE, "versions": versions(), **losses})


def corpus():
    """Records {text, package, module, kind} of installed sources and docstrings, no text twice."""
    from pydoc_data.topics import topics
    records = [dict(text=text, package="stdlib", module=f"pydoc_data.topics.{name}", kind="doc")
               for name, text in topics.items()]
    for package in tqdm(PACKAGES, desc="reading sources", unit="package"):
        left = {"code": RECIPE["code_chars"], "doc": RECIPE["doc_chars"]}
        for module, file in source_files(package):
            source = file.read_text(encoding="utf-8", errors="replace")
            found = []
            if left["code"] > 0:
                found.append(("code", strip_licence(source)[:RECIPE["file_chars"]]))
            if left["doc"] > 0:
                found += [("doc", text) for text in docstrings(source)]
            for kind, text in found:
                left[kind] -= len(text)
                records.append(dict(text=text, package=package, module=module, kind=kind))
            if max(left.values()) <= 0:
                break
    unique = {record["text"]: record for record in records}.values()
    return [*unique, *spelling(unique)]


def source_files(package):
    """(module, path) of the package's .py files, mixed in an order of their names alone."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            found.append((".".join([package, *parts]), path))
    return sorted(found, key=lambda item: hashed(item[0]))


def strip_licence(source):
    """The source without the comment block at its top."""
    return re.sub(r"\A(?:[^\S\n]*\n|#[^\n]*(?:\n|\Z))*", "", source)


def docstrings(source):
    """The docstrings of a source text that are long enough to be read on their own."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):        # a template, or a file for another Python
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    holders = (ast.stmt, ast.excepthandler, ast.match_case)      # not expressions: most of the tree
    nodes = [tree]
    for node in nodes:                       # grows while it is walked
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, holders)]
    docs = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
    return [doc for doc in docs if doc and len(doc) >= RECIPE["doc_min"]]


def spelling(records):
    """Documents of lines `word has the first letter: W`, which the absorption evaluation asks."""
    docs = [r["text"] for r in records if r["kind"] == "doc"]
    counts = Counter(word for text in docs for word in re.findall(r"\b[A-Za-z]{2,12}\b", text))
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:RECIPE["spelling_words"]]
    rng = random.Random(RECIPE["seed"])
    words = {held_out: [word for word, _ in common if is_held_out(word) == held_out]
             for held_out in (False, True)}
    documents = []
    for i in range(RECIPE["spelling_docs"]):
        module = f"spelling_{i}"
        chosen = rng.sample(words[is_held_out(module)], 8)       # held-out words if it is held out
        lines = [f"{rng.choice(['', ' '])}{word} has the first letter: {word[0].upper()}"
                 for word in chosen]
        documents.append(dict(text="\n".join(lines), package="spelling", module=module,
                              kind="spelling"))
    return documents


def hashed(text):
    return xxhash.xxh3_64_intdigest(text.encode())


def is_held_out(module):
    return hashed(f"held out: {module}") % 10_000 < 10_000 * RECIPE["held_out"]


def split_text(records):
    """(training, held-out) records, split by module and mixed."""
    records = sorted(records, key=lambda r: hashed(r["text"]))
    train = [r for r in records if not is_held_out(r["module"])]
    return train, [r for r in records if is_held_out(r["module"])]


def train_tokenizer(texts):
    """Byte-level BPE; digits one by one; BOS at the start of a text, as larger models have it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab"], special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    ends = accumulate(map(len, texts))
    few = (text for text, end in zip(texts, ends) if end < RECIPE["tokenizer_chars"])
    bpe.train_from_iterator(few, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=RECIPE["ctx"], clean_up_tokenization_spaces=False)


def train_tiny(tokens, held_out, tokenizer):
    """(model, losses): a Llama that starts as the best bigram model, trained on `tokens`."""
    R = RECIPE
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=R["d_model"], intermediate_size=R["d_mlp"],
        num_hidden_layers=R["n_layers"], num_attention_heads=R["n_heads"],
        max_position_embeddings=4 * R["ctx"], tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(R["seed"])
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:                     # a block adds nothing at first
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    unigram, bigram = count_models(tokens, config.vocab_size)
    fit_bigram(model, unigram, bigram)

    embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
    blocks = [*model.model.layers.parameters(), model.model.norm.weight]
    groups = [dict(params=embeddings, lr=R["embed_lr"]), dict(params=blocks, lr=R["lr"])]
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)

    def lr_scale(step):                                  # 3 % warm-up, 70 % decay
        return min((step + 1) / R["steps"] / 0.03, (1 - step / R["steps"]) / 0.7, 1)

    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lr_scale)
    for step in tqdm(range(R["steps"]), desc="training the language model", unit="step"):
        batch = tokens[step * R["batch"]:(step + 1) * R["batch"]]
        # without a mask transformers looks for several texts in a context: a tenth of a step
        logits = model(batch, torch.ones_like(batch), use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
    before, after = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    return model.eval(), {"loss": mean_loss(model, held_out),
                          "bigram_loss": -bigram[before, after].log().mean().item(),
                          "unigram_loss": -unigram[after].log().mean().item()}


def count_models(tokens, vocab):
    """Unigram [vocab] and bigram [vocab, vocab] probabilities, by absolute discounting."""
    before, after = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    unigram = (torch.bincount(after, minlength=vocab) + 1.0) / (len(after) + vocab)
    pairs = torch.bincount(before * vocab + after, minlength=vocab ** 2).view(vocab, vocab).float()
    seen, discount = pairs.sum(1, keepdim=True), 0.75
    kinds = (pairs > 0).sum(1, keepdim=True)
    backed_off = (pairs - discount).clamp_min(0) + discount * kinds * unigram
    return unigram, torch.where(seen > 0, backed_off / seen.clamp_min(1), unigram)


def fit_bigram(model, unigram, bigram):
    """Fit embedding, norm and unembedding to the whole bigram table.

    40 steps do what hundreds of steps on text would.
    """
    E, U, steps = model.model.embed_tokens.weight, model.lm_head.weight, RECIPE["bigram_steps"]
    opt = torch.optim.Adam([E, U], lr=RECIPE["bigram_lr"], betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc="fitting it to bigrams", unit="step"):
        opt.param_groups[0]["lr"] = RECIPE["bigram_lr"] * min(1, (steps - step) / (0.7 * steps))
        logits = model.model.norm(E) @ U.T
        # the gradient of the cross-entropy to the bigram table, rows weighted by their frequency
        logits.backward(unigram[:, None] * (logits.detach().softmax(-1) - bigram))
        opt.step()
        model.zero_grad()


@torch.no_grad()
def mean_loss(model, tokens):
    """Mean cross-entropy, in nats per token."""
    total = sum(model(batch, labels=batch).loss.item() * len(batch) for batch in tokens.split(32))
    return total / len(tokens)


# ---- the synthetic source: activations whose true features are known -----------------------------


class Synthetic:
    """Rows are sparse sums of known directions (sae_lens.synthetic).

    Features stand in trees: a parent fires whenever a child does, and half of the parents have
    children that exclude each other. Zipf frequencies, low-rank correlations, more features than
    dimensions.
    """

    recipe = dict(n_features=320, d_in=96, trees=40, children=4, depth=1, exclusive=0.5,
                  max_probability=0.6, min_probability=0.006, zipf=1.0, magnitude_std=0.25,
                  correlation=0.1)
    layers, ctx, d_in = [None], 1, recipe["d_in"]         # a context is one row

    def __init__(self, args):
        if args.layer or args.hook != "resid_post" or args.data:
            raise Refuse("--model synthetic has no layers, hooks or text: "
                         "leave --layer, --hook and --data out", 2)
        if not importlib.util.find_spec("sae_lens"):
            raise Refuse("--model synthetic needs the package sae_lens: pip install sae-lens", 4)
        self.seed, self.dtype = args.seed, getattr(torch, args.dtype)
        self.n_val = args.val_tokens

    def settings(self, layer):
        model = dict(name="synthetic", revision=importlib.metadata.version("sae_lens"),
                     **self.recipe)
        return dict(source="synthetic", model=model, layer=None, hook=None, hook_name="synthetic",
                    d_in=self.d_in, ctx=1, pack=False, data={"name": "synthetic"},
                    val_tokens=self.n_val)

    @functools.cached_property
    def model(self):
        from sae_lens import synthetic
        r = self.recipe
        return synthetic.SyntheticModel(synthetic.SyntheticModelConfig(
            num_features=r["n_features"], hidden_dim=r["d_in"], bias=False, seed=self.seed,
            std_firing_magnitudes=r["magnitude_std"],
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                r["zipf"], r["max_probability"], r["min_probability"]),
            hierarchy=synthetic.HierarchyConfig(r["trees"], r["children"], r["depth"],
                                                r["exclusive"], compensate_probabilities=True),
            correlation=synthetic.LowRankCorrelationConfig(16, correlation_scale=r["correlation"])))

    def sample(self, rows, *key):
        """(activations, feature activations) that depend on the seed and the key alone."""
        torch.manual_seed(generator(self.seed, *key).initial_seed())
        return self.model.sample_with_features(rows)

    def held_out(self):
        """({file: tensors}, 0): held-out rows, and the truth: directions, rates and parents."""
        acts, features = self.sample(self.n_val, "val")
        # measured, as the trees change the configured one
        rate = (self.sample(100_000, "rate")[1] > 0).float().mean(0)
        parent = torch.full((len(rate),), -1, dtype=torch.int32)
        nodes = list(self.model.hierarchy.roots)
        for node in nodes:                                # grows while it is walked
            nodes += node.children
            parent[[child.feature_index for child in node.children]] = node.feature_index
        dictionary = self.model.feature_dict.feature_vectors.detach()
        return {"val": dict(acts=acts, features=features),
                "truth": dict(dictionary=dictionary, probability=rate, parent=parent)}, 0

    def stream(self, start):
        return itertools.repeat(None)

    def norm_limits(self, val, layers):
        return [10 * val["acts"].norm(dim=1).median().item()]

    def run(self, found, first, layers, bar):
        acts = self.sample(len(found), "train", first)[0].to(self.dtype)
        bar.update(len(found))
        tokens = torch.zeros(len(found), 1, dtype=torch.int32)
        return tokens, torch.ones(tokens.shape, dtype=torch.bool), 0, [acts]


# ---- texts to contexts ---------------------------------------------------------------------------


KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PACKED = {".gz", ".zst", ".xz", ".bz2"}
# word in a file's name -> split
SPLITS = {"val": "validation", "valid": "validation", "dev": "validation",
          "validation": "validation", "test": "test", "train": "train"}


class Text:
    """The documents of a hub data set, a file or a folder; `description` goes into meta.json."""

    def __init__(self, args, data):
        self.name, self.column, path = data, args.column, Path(data)
        self.trusted = args.trust_remote_code
        self.description = dict(name=data, column=args.column, split=args.split, config=args.config)
        self.files = self.held_out_files = None
        if path.is_file() and kind_of(path):
            if args.config:
                raise Refuse("--config names a folder of a data set, --data is a file", 2)
            self.files, self.held_out_files = [path], []
        elif path.exists():
            self.take_folder(path, args.split, args.config)
        elif kind_of(path):
            raise Refuse(f"--data {data}: no such file or folder", 2)
        elif huggingface_hub.constants.HF_HUB_OFFLINE:  # what `hf download` left in the hub's cache
            with hub_errors("data set", data):
                path = huggingface_hub.snapshot_download(data, repo_type="dataset",
                                                         local_files_only=True)
            self.take_folder(Path(path), args.split, args.config)
            self.description["revision"] = Path(path).name
        else:
            with hub_errors("data set", data):
                self.description["revision"] = huggingface_hub.dataset_info(data, timeout=10).sha
                # says if it is gated, which dataset_info() does not
                huggingface_hub.file_exists(data, "README.md", repo_type="dataset")
        if self.files and "revision" not in self.description:
            self.description["checksum"] = files_checksum(self.files + self.held_out_files)

    def take_folder(self, folder, split, config):
        """Choose a folder's files: of one kind and split, and under `config` if it is given."""
        check_configuration(folder, config)
        there = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        kind = main_kind(there)
        if not kind:
            raise Refuse(f"--data {self.name}: want a {', '.join(KINDS)} file, or a folder", 2)
        chosen = [p for p in there if kind_of(p) == kind]
        if config:
            chosen = [p for p in chosen if config in p.relative_to(folder).parts]
        self.held_out_files = [p for p in chosen if split_of(p, folder) == "held out"]
        self.files = [p for p in chosen if split_of(p, folder) == split]
        if not self.files:
            under = f" and --config {config}" if config else ""
            raise Refuse(f"--data {self.name}: no {kind} file of --split {split}{under}", 2)
        rest = sorted({*there} - {*self.files} - {*self.held_out_files})
        if rest:
            print(f"note: {self.name}: left out {len(rest)} that are not {kind} of split {split}: "
                  + ", ".join(str(p.relative_to(folder)) for p in rest[:5])
                  + (", ..." if rest[5:] else ""))

    def train(self):
        if self.files is not None:
            return self.read(self.files)
        about = self.description
        records = read_table("data set", self.name, self.name, about["config"],
                             split=about["split"], revision=about["revision"],
                             trust_remote_code=self.trusted)
        return texts(records, self.column, f"data set {self.name}, record")

    def read(self, files):
        for path in files:
            if suffix_of(path) == ".txt":
                yield from read_txt(path)
            elif suffix_of(path) == ".jsonl":
                yield from texts(read_jsonl(path), self.column, f"{path}, line")
            else:
                records = read_table("data file", path, kind_of(path), split="train",
                                     data_files=glob.escape(str(path)))
                yield from texts(records, self.column, f"{path}, record")


def check_configuration(folder, config):
    """Refuse a data set of the hub whose README.md lists several configurations, but not this."""
    card = folder / "README.md"
    with hub_errors("data set card", card):
        about = huggingface_hub.metadata_load(card) if card.exists() else None
        named = [entry["config_name"] for entry in (about or {}).get("configs", [])]
    if len(named) > 1 and config not in named:
        raise Refuse(f"--data {folder} has the configurations {', '.join(named)}: say which with "
                     "--config", 2)


def main_kind(files):
    """The kind of most files; one .txt beside one table is a licence. None if none holds data."""
    kinds = [kind for kind in map(kind_of, files) if kind]
    return max(kinds, key=lambda kind: (kinds.count(kind), kind != "text"), default=None)


def suffix_of(path):
    """.jsonl of data.jsonl.gz."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in PACKED), None)


def kind_of(path):
    """json, parquet, csv or text; None for a file that is no data."""
    return KINDS.get(suffix_of(path))


def split_of(path, folder):
    """The split that a name such as data/test-00000-of-00002.parquet speaks of; else train."""
    if path.name.startswith("val."):
        return "held out"
    words = re.findall("[a-z]+", str(path.relative_to(folder)).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def read_txt(path):
    """Documents of about 10,000 characters, cut at line ends."""
    line = 0
    with unpacked(path) as f:
        while lines := f.readlines(10_000):
            where = f"{path}, line {line + 1} or after"
            yield checked(as_text(b"".join(lines), where), where)
            line += len(lines)


def read_jsonl(path):
    """The records of a file with one JSON object a line; None for an empty line."""
    with unpacked(path) as f:
        for number, line in enumerate(f, 1):
            text = as_text(line, f"{path}, line {number}")
            try:
                yield json.loads(text) if text.strip() else None
            except ValueError as e:
                raise Refuse(f"{path}, line {number}: not JSON ({e})") from None


@contextlib.contextmanager
def unpacked(path):
    """The bytes of a file, which may be compressed."""
    if path.suffix == ".zst" and not importlib.util.find_spec("zstandard"):
        raise Refuse(f"{path} needs the package zstandard: pip install zstandard", 4)
    with hub_errors("data file", path), fsspec.open(str(path), compression="infer") as f:
        yield io.BufferedReader(f)


def read_table(what, name, *args, **kwargs):
    """The records of datasets.load_dataset(*args, **kwargs). what, name: see hub_errors()."""
    if not importlib.util.find_spec("datasets"):
        raise Refuse("such data need the package datasets: pip install datasets, or give .jsonl", 4)
    with hub_errors(what, name):
        import datasets      # late: text files and the embedded model do without it
        yield from datasets.load_dataset(*args, **kwargs, streaming=True)


def as_text(data, where):
    """Bytes as text; a byte-order mark at their start is dropped."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        byte = data[e.start]
        raise Refuse(f"{where}: not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8") from None


def texts(records, column, where):
    """What `column` holds in each record, which must be text; an absent one (null) is empty."""
    for number, record in enumerate(records, 1):
        if record is None:
            continue
        columns = record if isinstance(record, dict) else {}
        if column not in columns:
            raise Refuse(f"{where} {number}: no column {column!r}, there are "
                         f"{', '.join(columns) or 'none'}: say which with --column", 2)
        text = "" if columns[column] is None else columns[column]
        if not isinstance(text, str):
            raise Refuse(f"{where} {number}: column {column!r} holds {type(text).__name__}, not "
                         "text: make a column of plain text, or name another with --column")
        yield checked(text, f"{where} {number}")


def checked(text, where):
    """The text without NULs, of which large corpora hold a few. Refuse what no text holds: half a
    surrogate pair, or as many NULs as UTF-16 has."""
    plain = text.replace("\0", "")
    is_utf_16 = 0 < len(plain) < 0.9 * len(text)
    odd = re.search("[\0\ud800-\udfff]", text if is_utf_16 else plain)
    if odd:
        raise Refuse(f"{where}: holds the character U+{ord(odd[0]):04X}, as no proper text does: "
                     "repair it and save it as UTF-8")
    return plain


def contexts(documents, tokenizer, ctx, pack, group=64):
    """Yields (documents read so far, token ids of a context: at most ctx).

    Packed: documents one after another, an EOS after each if the tokenizer has one, cut into full
    contexts. Else one context a document. BOS stands first if the tokenizer puts one before a text.
    group: documents that are read at once.
    """
    bos = starting_tokens(tokenizer)
    room = ctx - len(bos)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents, n_read, rest = iter(documents), 0, []
    while found := list(islice(documents, group)):
        n_read += len(found)
        ids = tokenizer(found, add_special_tokens=False, verbose=False).input_ids
        if pack:
            tokens = rest + [token for i in ids if i for token in i + end]
            made = [tokens[i:i + room] for i in range(0, len(tokens) - room + 1, room)]
            rest = tokens[len(made) * room:]
        else:
            made = [i[:room] for i in ids if i]
        for context in made:
            yield n_read, bos + context


def starting_tokens(tokenizer):
    """[BOS] if the tokenizer puts one before a text (Gemma, Llama), else [] (GPT-2, Pythia)."""
    text = tokenizer.decode(list(range(min(100, len(tokenizer)))))  # "a" may be unknown to it
    plain = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer(text).input_ids                     # BOS may also be the EOS that stands last
    starts = whole[:1] == [tokenizer.bos_token_id] and whole[1:len(plain) + 1] == plain
    return whole[:1] if starts else []


# ---- contexts to activations ---------------------------------------------------------------------


class Stop(Exception):
    """Raised by the hook on the deepest layer: what comes after it is not computed."""


class LanguageModel:
    """Rows are activations of a transformer at one or more layers, read by hooks."""

    def __init__(self, args):
        path, data = tiny_model() if args.model == "tiny" else (args.model, None)
        data = args.data or data
        if not data:
            raise Refuse(f"--model {path}: say which text with --data (hub, file or folder)", 2)
        self.args, self.path, self.ctx, self.device = args, path, args.ctx, args.device
        self.extra = dict(trust_remote_code=args.trust_remote_code)
        with hub_errors("model", path):
            if Path(path).exists():
                self.revision = model_checksum(path)
            else:                                         # of all that is fetched from now on
                file = huggingface_hub.hf_hub_download(path, "config.json")
                self.revision = self.extra["revision"] = Path(file).parent.name
            sizes = model_config(path, **self.extra).get_text_config()
            self.tokenizer = model_tokenizer(path, **self.extra)
        self.d_in, self.n_layers = sizes.hidden_size, sizes.num_hidden_layers
        self.n_tokens = sizes.vocab_size
        self.layers = sorted(set(args.layer or [self.n_layers // 2]))
        if self.layers[-1] >= self.n_layers:
            raise Refuse(f"--layer {self.layers[-1]}: {args.model} has layers 0 to "
                         f"{self.n_layers - 1}", 2)
        longest = min(getattr(sizes, "max_position_embeddings", None) or self.ctx, 32767)
        if not 2 <= self.ctx <= longest:
            raise Refuse(f"--ctx {self.ctx}: want 2 to {longest} for {args.model}", 2)
        self.text = Text(args, data)
        special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.special = torch.tensor([t for t in special if t is not None], dtype=torch.int32)

    def settings(self, layer):
        args = self.args
        model = dict(name=args.model, path=self.path, revision=self.revision,
                     n_layers=self.n_layers, dtype=args.model_dtype)
        return dict(source="model", model=model, layer=layer, hook=args.hook,
                    hook_name=f"blocks.{layer}.hook_{args.hook}", d_in=self.d_in, ctx=self.ctx,
                    pack=args.pack, data=self.text.description,
                    val_tokens=args.val_tokens)

    @functools.cached_property
    def model(self):
        """The model without its head; loaded late, as the data may be wrong."""
        with hub_errors("model", self.path):
            model = language_model(self.path, getattr(torch, self.args.model_dtype), **self.extra)
        return model.base_model.to(self.device)

    @property
    def blocks(self):
        return decoder_layers(self.model, self.n_layers, self.args.model)

    @torch.no_grad()
    def watch(self, tokens):
        """({module: (its input, its output)}, hidden states) of a forward pass on tokens [1, n]."""
        seen = {}

        def record(module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states")
            output = output[0] if isinstance(output, tuple) else output
            # cloned, as Falcon adds to it in place
            seen[module] = given, output.clone() if torch.is_tensor(output) else None

        with hooks(self.model.modules(), record, with_kwargs=True):
            out = self.model(tokens, use_cache=False, output_hidden_states=True, return_dict=True)
        return seen, out.hidden_states or ()

    def check_meaning(self, tokens):
        """Refuse a model whose hooks don't mean what their names say, shown on tokens [1, n]."""
        name, hook, half = self.args.model, self.args.hook, tokens.shape[1] // 2
        seen, hidden = self.watch(tokens)
        inside = {module for block in self.blocks for module in block.modules()}
        # the last hidden state is normed: there the stream is what the norm was given
        streams = [*hidden, *(given for module, (given, _) in seen.items() if module not in inside)]
        for layer in self.layers:
            given, out = seen.get(self.blocks[layer], (None, None))
            shape = (*tokens.shape, self.d_in)
            is_stream = any(close(stream, out, out) for stream in streams)
            if not is_stream or out.shape != shape:
                raise Refuse(f"{name}: the output of layer {layer} is not the residual stream, "
                             f"one of the model's hidden states {list(shape)}: it can't be cached")
            if hook != "resid_post":
                points = [hook_point(self.blocks[layer], each, name) for each in HOOKS[1:]]
                if not close(seen[points[0]][1] + seen[points[1]][1], out - given, out):
                    raise Refuse(f"--hook {hook}: in {name} what attention and MLP give does not "
                                 "add up to what a layer adds: only resid_post is known")

        # other tokens in the second half may change nothing in the first
        other = torch.cat([tokens[:, :half], (tokens[:, half:] + 1) % self.n_tokens], 1)
        again, _ = self.watch(other)
        for layer in self.layers:
            first, then = (run[self.blocks[layer]][1][:, :half] for run in (seen, again))
            if not close(then, first, first):
                raise Refuse(f"{name} is not causal: later tokens change a token's activations")

    def held_out(self):
        """({file: tensors}, documents read): the held-out contexts, and where training text starts.

        Without files val.*, a tenth of what there is at most.
        """
        args, files, start = self.args, self.text.held_out_files, 0
        n = max(1, args.val_tokens // self.ctx)
        documents = self.text.read(files) if files else self.text.train()
        found = contexts(documents, self.tokenizer, self.ctx, args.pack, group=1)
        if files:
            found = list(islice(found, n))
        else:
            n = max(1, min(n, args.tokens // 10 // self.ctx))
            found = list(islice(found, 10 * n))
            found = found[:max(1, len(found) // 10)]
            start = max((n_read for n_read, _ in found), default=0)
        if not found or next(self.stream(start), None) is None:
            raise Refuse(f"--data {self.text.name}: the text is too short, or too few documents, "
                         f"for one context of {self.ctx} tokens to hold out and one of other "
                         "documents: give more, or a smaller --ctx")
        tokens, mask, _ = self.block([context for _, context in found])
        return {"val": dict(tokens=tokens, mask=mask)}, start

    def stream(self, start):
        """The contexts of the text after its first `start` documents."""
        documents = islice(self.text.train(), start, None)
        found = contexts(documents, self.tokenizer, self.ctx, self.args.pack)
        return (context for _, context in found)

    def block(self, found):
        """Contexts as tokens [n, ctx] int32, the mask [n, ctx] of those that are rows, and the
        number of padding tokens."""
        # padding stands last, so a causal model needs no mask
        lengths = torch.tensor([len(context) for context in found])
        text = torch.arange(self.ctx) < lengths[:, None]
        tokens = torch.zeros(text.shape, dtype=torch.int32)
        tokens[text] = torch.tensor(list(itertools.chain(*found)), dtype=torch.int32)
        unknown = int(tokens.max())
        if unknown >= self.n_tokens:
            token = self.tokenizer.decode([unknown])
            raise Refuse(f"{self.args.model}: the tokenizer's {token!r} is token {unknown}, the "
                         f"model has {self.n_tokens}: resize its embedding, or remove that token "
                         "from the text")
        return tokens, text & ~torch.isin(tokens, self.special), int((~text).sum())

    def norm_limits(self, val, layers):
        """10 x the median norm of held-out rows, for each layer: what is above is an outlier.

        Before that, what the hooks mean is checked on the fullest context.
        """
        rows = val["mask"][:64].flatten().nonzero()[:, 0].to(self.device)
        if not len(rows):
            raise Refuse(f"--data {self.text.name}: the held-out text has only special tokens")
        fullest = val["tokens"][val["mask"].sum(1).argmax()]
        self.check_meaning(fullest[None, :32].long().to(self.device))
        acts = self.activations(val["tokens"][:64], layers, tqdm(disable=True))
        return [10 * row_norms(of_layer, rows, 0, layer)[0].median().item()
                for layer, of_layer in zip(layers, acts)]

    def run(self, found, first, layers, bar):
        """(tokens, mask, padding) of block(), and activations()."""
        tokens, mask, padding = self.block(found)
        return tokens, mask, padding, self.activations(tokens, layers, bar)

    @torch.no_grad()
    def activations(self, tokens, layers, bar):
        """[n * ctx, d_in] for each of the ascending layers, on the device, in the cache's dtype."""
        points = [hook_point(self.blocks[layer], self.args.hook, self.path) for layer in layers]
        dtype = getattr(torch, self.args.dtype)
        acts = {point: torch.empty(tokens.numel(), self.d_in, dtype=dtype, device=self.device)
                for point in points}
        at = 0

        def keep(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            rows = output.flatten(0, 1)
            acts[module][at:at + len(rows)] = rows
            if module is points[-1]:
                raise Stop

        with hooks(points, keep):
            for batch in tokens.split(self.args.batch):
                ids = batch.long().to(self.device)
                with contextlib.suppress(Stop):            # why a mask: see train_tiny()
                    self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
                at += batch.numel()
                bar.update(batch.numel())
        return list(acts.values())


@contextlib.contextmanager
def hooks(modules, hook, **kwargs):
    """Call hook(module, ...) after each of the modules, for a while."""
    handles = [module.register_forward_hook(hook, **kwargs) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def close(a, b, stream):
    """Whether a and b are equal, up to the rounding of a `stream` that they were added to."""
    if not torch.is_tensor(a) or a.shape != b.shape:
        return False
    rounding = 8 * torch.finfo(stream.dtype).eps * stream.float().norm()
    return bool((a - b).float().norm() <= 0.001 * b.float().norm() + rounding)


# ---- activations to shuffled shards --------------------------------------------------------------
#
# The contexts are run in parts of about --rows-per-shard rows. Each row of a part is sent to a
# shard drawn at random; its rows go to scratch/ in the order of shards. Then shard i gathers the
# i-th slice of all parts and is permuted: an exact shuffle of the whole cache with one part in
# memory. Parts and shards depend on their number alone, so the processes of torchrun take them in
# turn, and a run that was killed goes on with what is there.


class Cache:
    """A folder acts/NAME being written."""

    def __init__(self, folder, settings, args):
        self.folder, self.scratch = folder, folder / "scratch"
        self.settings = {"format": FORMAT, **settings, "dtype": args.dtype, "tokens": args.tokens,
                         "rows_per_shard": args.rows_per_shard, "seed": args.seed}
        self.settings = json.loads(json.dumps(self.settings))             # as it is read back
        self.dtype = getattr(torch, args.dtype)
        self.d_in, self.ctx = settings["d_in"], settings["ctx"]
        self.layer, self.seed = settings["layer"], args.seed
        self.n_contexts = max(1, args.tokens // self.ctx)
        self.per_part = max(1, args.rows_per_shard // self.ctx)           # contexts of a part
        self.n_slices = -(-self.n_contexts * self.ctx // args.rows_per_shard)
        self.width = self.d_in * self.dtype.itemsize + COLUMNS * 4  # bytes of a row in scratch

    def state(self):
        """"complete", "begun" or "absent"; Refuse if it was made with other settings."""
        path = self.folder / "meta.json"
        if not path.exists():
            return "absent"
        self.meta = read_json(path, "complete", "shards", "val")
        there = flat(self.meta)
        wrong = [key for key, value in flat(self.settings).items() if there.get(key) != value]
        if wrong and not self.meta["complete"] and not any(self.scratch.glob("part_*.safetensors")):
            return "absent"                               # nothing yet that is worth going on with
        for key in wrong:
            wanted = flat(self.settings)[key]
            raise Refuse(f"{self.folder} was made with {key} {there.get(key)}, not {wanted}: give "
                         "another --name, or delete that folder", 2)
        held_out = [self.meta[name] for name in ("val", "truth") if name in self.meta]
        for entry in held_out + self.meta["shards"]:
            path = self.folder / entry["file"]
            if not path.exists() or path.stat().st_size != entry.get("bytes", path.stat().st_size):
                raise Refuse(f"{path} is missing or cut short: delete {self.folder}, cache again")
        return "complete" if self.meta["complete"] else "begun"

    def begin(self, files, start, norm_limit):
        """Start the cache: the held-out files, and meta.json with all that is fixed from now on."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        held = {}
        for name, tensors in files.items():
            written = write_tensors(self.folder / f"{name}.safetensors", tensors)
            held[name] = {"file": f"{name}.safetensors", "checksum": written}
        held["val"]["contexts"] = len(next(iter(files["val"].values())))
        self.meta = {**self.settings, **held, "norm_limit": norm_limit, "start": start,
                     "complete": False, "shards": [], "versions": versions()}
        write_json(self.folder / "meta.json", self.meta)

    def bytes_to_come(self):
        """How much the cache will grow; scratch shrinks while the shards grow."""
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        rows = self.n_contexts * self.ctx
        rows += 2 * min(rows, self.settings["rows_per_shard"])
        return rows * self.width - there

    def part(self, number):
        return self.scratch / f"part_{number:05d}.safetensors"

    def entry(self, shard):
        return self.scratch / f"shard_{shard:05d}.json"

    def add(self, number, tokens, mask, padding, acts):
        """Draw a shard for each row of a part; returns a function that writes the part."""
        index = mask.flatten().nonzero()[:, 0].to(acts.device)
        norms, vector = row_norms(acts, index, self.meta["norm_limit"], self.layer)
        usual = norms <= self.meta["norm_limit"]
        kept, norms = index[usual].cpu(), norms[usual].double()
        draw = generator(self.seed, "shard", number)
        shard = torch.randint(self.n_slices, (len(kept),), generator=draw)
        kept = kept[shard.argsort(stable=True)]
        counts = shard.bincount(minlength=self.n_slices)
        context, position = number * self.per_part + kept // self.ctx, kept % self.ctx
        columns = torch.stack([tokens.flatten()[kept], context, position], 1)
        meta = {"contexts": len(tokens), "rows": len(kept), "norm": norms.sum().item(),
                "bos": tokens.numel() - padding - len(index), "padding": padding,
                "outlier": len(index) - len(kept)}
        rows = to_host(acts, kept)
        return functools.partial(self.write_part, number, rows, columns.int(), counts, vector, meta)

    def write_part(self, number, rows, columns, counts, vector, meta):
        """Write a part: its rows, a slice for each shard, and then the file that lists them."""
        path, hashes, begin = self.part(number).with_suffix(".raw"), [], 0
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as f:                       # no fsync: the hashes show what was lost
            for end in counts.cumsum(0).tolist():
                hashed = xxhash.xxh3_64()
                blocks = (rows(at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK))
                for block in itertools.chain(blocks, [columns[begin:end]]):
                    hashed.update(as_bytes(block))
                    f.write(as_bytes(block))
                hashes.append(hashed.intdigest() >> 1)    # a positive int64
                begin = end
        tensors = {"counts": counts, "hashes": torch.tensor(hashes), "vector": vector}
        write_tensors(self.part(number), tensors, meta)

    def finish(self, n_parts, rank, processes):
        """Turn the parts into shards; rank 0 lists them in meta.json and tidies up."""
        paths = [self.part(number) for number in range(n_parts)]
        try:
            wait_for(paths, unless=lambda: self.state() == "complete")
            parts = [read_tensors(path) for path in paths]
        except Refuse:
            if self.state() == "complete":  # rank 0 had all that it needed, and has tidied up
                return
            raise
        total = {key: sum(meta[key] for _, meta in parts) for key in TOTALS}
        if not total["rows"]:
            raise Refuse(f"{self.folder}: the text has only special tokens: give other text")
        mean = sum(tensors["vector"] for tensors, _ in parts) / total["rows"]
        counts = torch.stack([tensors["counts"] for tensors, _ in parts])  # [parts, slices]
        hashes = torch.stack([tensors["hashes"] for tensors, _ in parts])

        # several slices to a shard if the text ended early
        per = max(1, self.n_slices * self.settings["rows_per_shard"] // total["rows"])
        shards = [slice(i, i + per) for i in range(0, self.n_slices, per)]
        shards = [s for s in shards if counts[:, s].sum()]
        self.write_shards(shards, counts, hashes, mean.float(), rank, processes)
        if rank == 0:
            wait_for([self.entry(i) for i in range(len(shards))])
            self.write_meta(len(shards), total, mean)

    def write_shards(self, shards, counts, hashes, mean, rank, processes):
        """Write this process' shards, the last first, see cut()."""
        mine = [i for i in reversed(range(len(shards))) if i % processes == rank]
        mine = [i for i in mine if not self.entry(i).exists()]
        largest = max(int(counts[:, s].sum()) for s in shards)
        # kept, as new memory costs more than copying
        buffers = [torch.empty(largest, self.d_in, dtype=self.dtype) for _ in range(2)]
        for i in tqdm(mine, f"shuffling {self.folder.name}", unit="shard", disable=rank > 0):
            columns = self.gather(counts[:, shards[i]], hashes[:, shards[i]], buffers[0],
                                  counts[:, :shards[i].start].sum(1))
            self.write_shard(i, columns, *buffers, mean)
            if rank == 0:
                self.cut(counts, shards)

    def gather(self, counts, hashes, into, before):
        """Read some slices of all parts into `into`; returns their columns [rows, 3].

        counts, hashes [parts, slices] are of these slices; before [parts]: how many rows of a part
        stand before them.
        """
        columns = torch.empty(int(counts.sum()), COLUMNS, dtype=torch.int32)
        n = 0
        for number, skip in enumerate(before.tolist()):
            path = self.part(number).with_suffix(".raw")
            with open(path, "rb") as f:
                f.seek(skip * self.width)
                for count, wanted in zip(counts[number].tolist(), hashes[number].tolist()):
                    hashed = xxhash.xxh3_64()
                    for block in into[n:n + count], columns[n:n + count]:
                        f.readinto(as_bytes(block))
                        hashed.update(as_bytes(block))
                    if hashed.intdigest() >> 1 != wanted:
                        raise Refuse(f"{path} is damaged (its checksum differs): delete "
                                     f"{self.scratch} and run the same command again")
                    n += count
        return columns

    def write_shard(self, i, columns, rows, shuffled, mean):
        """Permute and write a shard, and then the file that says that it is there."""
        n = len(columns)
        order = torch.randperm(n, generator=generator(self.seed, "shuffle", i))
        acts = torch.index_select(rows[:n], 0, order, out=shuffled[:n])
        tokens, context, position = columns[order].T
        tensors = {"acts": acts, "tokens": tokens, "context": context, "position": position.short()}
        path = self.folder / f"train_{i:05d}.safetensors"
        written = write_tensors(path, tensors)
        spread = sum(torch.linalg.vector_norm(block.float() - mean, dim=1).double().sum().item()
                     for block in acts.split(BLOCK))
        shard = {"file": path.name, "rows": n, "bytes": path.stat().st_size, "checksum": written}
        write_json(self.entry(i), {"shard": shard, "spread": spread})

    def cut(self, counts, shards):
        """Free the end of the parts that finished shards were made of."""
        left = [i for i in range(len(shards)) if not self.entry(i).exists()]
        stop = shards[left[-1]].stop if left else 0
        for number, rows in enumerate(counts[:, :stop].sum(1).tolist()):
            path = self.part(number).with_suffix(".raw")
            if path.stat().st_size > rows * self.width:
                os.truncate(path, rows * self.width)

    def write_meta(self, n_shards, total, mean):
        """List the shards in meta.json, with the rows' statistics: the cache is complete."""
        n, entries = total["rows"], [read_json(self.entry(i)) for i in range(n_shards)]
        spread = sum(entry["spread"] for entry in entries) / n            # E||row - mean||
        if spread == 0:
            raise Refuse(f"{self.folder}: all rows are equal: give other text, or another layer")
        self.meta |= {
            "complete": True, "rows": n, "contexts": total["contexts"],
            "shards": [entry["shard"] for entry in entries],
            "dropped": {key: total[key] for key in ("bos", "padding", "outlier")},
            "mean": mean.tolist(), "mean_norm": total["norm"] / n,
            "scale": self.d_in ** 0.5 / spread}
        write_json(self.folder / "meta.json", self.meta)
        shutil.rmtree(self.scratch)
        if total["contexts"] < self.n_contexts:
            print(f"note: the text ends after {total['contexts'] * self.ctx:,} tokens of "
                  f"{self.n_contexts * self.ctx:,}")
        print(f"{self.folder}: {n:,} rows of {self.d_in} in {n_shards} shards, mean norm "
              f"{self.meta['mean_norm']:.3g}, dropped {self.meta['dropped']}")


TOTALS = ("contexts", "rows", "norm", "bos", "padding", "outlier")        # sums over the parts
COLUMNS = 3                  # tokens, context and position, as int32 beside each row in scratch
BLOCK = 256                  # rows that a CPU's cache holds


def row_norms(acts, index, limit, layer):
    """Norms of the rows `index`, and the sum of those rows (float64) whose norm is at most `limit`.

    In blocks: whole shards as float32 or float64 cost 7 times as much on a CPU.
    """
    norms = torch.empty(len(index), device=acts.device)
    vector = torch.zeros(acts.shape[1], dtype=torch.float64, device=acts.device)
    block = BLOCK if acts.device.type == "cpu" else 8192
    for some, into in zip(index.split(block), norms.split(block)):
        rows = acts[some].float()
        torch.linalg.vector_norm(rows, dim=1, out=into)
        vector += (into <= limit).float() @ rows
    if not norms.isfinite().all():
        raise Refuse(f"activations of layer {layer} are not finite as {acts.dtype}: try --dtype "
                     "bfloat16 or float32, and --model-dtype float32")
    return norms, vector.cpu()


def to_host(acts, kept):
    """A function of (begin, end) that returns these of the rows `kept`, on the CPU.

    From a GPU they are copied while the model goes on.
    """
    if acts.device.type == "cpu":
        return lambda begin, end: acts[kept[begin:end]]
    on_gpu = acts[kept.to(acts.device)]
    host = torch.empty(on_gpu.shape, dtype=on_gpu.dtype, pin_memory=True)
    side = torch.cuda.Stream(acts.device)
    side.wait_stream(torch.cuda.current_stream(acts.device))
    with torch.cuda.stream(side):
        host.copy_(on_gpu, non_blocking=True)
    on_gpu.record_stream(side)

    def rows(begin, end):
        side.synchronize()
        return host[begin:end]
    return rows


def as_bytes(tensor):
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def flat(value, prefix=""):
    """{"a b": 1} of {"a": {"b": 1}}."""
    if not isinstance(value, dict):
        return {prefix.strip(): value}
    return {key: v for k, inner in value.items() for key, v in flat(inner, f"{prefix} {k}").items()}


def wait_for(paths, unless=lambda: False):
    """Block until the other processes have written these files; torchrun stops all if one fails."""
    while not all(path.exists() for path in paths) and not unless():
        time.sleep(0.2)


def versions():
    packages = (torch, transformers, tokenizers, safetensors)
    return {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}}


# ---- main ----------------------------------------------------------------------------------------


def main():
    args = parse_args()
    rank, processes = ranks()
    huggingface_hub.utils.logging.set_verbosity_error()  # of retries; hub_errors says how they end
    transformers.utils.logging.disable_progress_bar()
    source = Synthetic(args) if args.model == "synthetic" else LanguageModel(args)
    caches = [Cache(folder, source.settings(layer), args)
              for folder, layer in zip(folders(args, source.layers), source.layers)]
    held = [lock(cache.folder) for cache in caches if rank == 0]
    try:
        while rank > 0 and any(cache.state() == "absent" for cache in caches):
            time.sleep(0.2)                               # the process of rank 0 begins them
        for cache in caches:
            if cache.state() == "complete" and rank == 0:
                shutil.rmtree(cache.scratch, ignore_errors=True)  # of a run killed as it tidied up
                print(f"{cache.folder} is complete: {cache.meta['rows']:,} rows")
        caches = [cache for cache in caches if cache.state() != "complete"]
        if not caches:
            return
        begin(source, caches)
        if rank == 0:
            check_disk(caches)
        fill(source, caches, rank, processes)
    finally:
        for one in held:
            one.release()


def begin(source, caches):
    """Begin those caches that are not begun."""
    fresh = [cache for cache in caches if cache.state() == "absent"]
    if fresh:
        files, start = source.held_out()
        limits = source.norm_limits(files["val"], [cache.layer for cache in fresh])
        for cache, limit in zip(fresh, limits):
            cache.begin(files, start, limit)


def check_disk(caches):
    """Refuse if the disk can't hold the caches."""
    need, free = sum(cache.bytes_to_come() for cache in caches), shutil.disk_usage("acts").free
    if need > free:
        raise Refuse(f"{', '.join(str(cache.folder) for cache in caches)}: {need / 1e9:,.2f} GB to "
                     f"write, the disk has {free / 1e9:,.2f} GB free: make room, or ask for fewer "
                     "--tokens", 4)


def fill(source, caches, rank, processes):
    """Run the text through the model, once for all caches, and finish them."""
    # go on after the parts that every cache has
    number, per_part, end = 0, caches[0].per_part, caches[0].n_contexts
    while all(cache.part(number).exists() for cache in caches):
        number += 1
    stream = islice(source.stream(caches[0].meta["start"]), number * per_part, end)
    with ThreadPoolExecutor(1) as writer, tqdm(
            desc="caching", total=end * source.ctx, initial=number * per_part * source.ctx,
            unit="tokens", unit_scale=True, disable=rank > 0) as bar:
        writing = []
        while number * per_part < end and (found := list(islice(stream, per_part))):
            missing = [cache for cache in caches if not cache.part(number).exists()]
            if missing and number % processes == rank:
                jobs = run_part(source, missing, number, found, bar)
                for job in writing:
                    job.result()
                writing = [writer.submit(job) for job in jobs]
            else:
                bar.update(len(found) * source.ctx)
            number += 1
        for job in writing:
            job.result()
    for cache in caches:
        cache.finish(number, rank, processes)


def run_part(source, caches, number, found, bar):
    """Run a part's contexts through the model; returns the functions that write it, one a cache."""
    tokens, mask, padding, acts = source.run(found, number * caches[0].per_part,
                                             [cache.layer for cache in caches], bar)
    return [cache.add(number, tokens, mask, padding, of_layer)
            for cache, of_layer in zip(caches, acts)]


def folders(args, layers):
    """Where each layer goes."""
    model = Path(os.path.abspath(args.model)).name.removesuffix(".gguf")     # also of ".", ".."
    hook = "" if args.hook == "resid_post" else f"_{args.hook}"
    name = args.name or re.sub(r"[^\w.+-]|^[.-]", "_", model, flags=re.ASCII) + hook
    numbered = len(layers) > 1 or (args.layer and args.name is None)
    return [Path("acts") / (f"{name}_l{layer}" if numbered else name) for layer in layers]


if __name__ == "__main__":
    run_script(main)
