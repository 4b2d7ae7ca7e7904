"""Promises about the Hugging Face hub, kept against a small one on this machine (hub.py): models
and data come by name, only what is needed of them, at one revision; what is gated, missing or
out of reach ends in one line; what was fetched once serves offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from hub import Hub  # noqa: E402
from sae import Acts  # noqa: E402
from test_cache import SMALL, contents, save, texts, write_jsonl  # noqa: E402

FILES, PER_FILE = 4, 400
ASK = ["--model", "toys/words", "--layer", "1", "--data", "toys/stories", "--column", "story",
       *SMALL]

FORKS = """
import importlib, json, os, sys, time
pause = time.sleep           # the hub's library waits 23 s before it gives up
time.sleep = lambda seconds: pause(min(seconds, 0.1))
sys.path.insert(0, sys.argv[1])
from sae import run_script
script = importlib.import_module("01_cache_acts")
import datasets, torch, transformers
transformers.GPT2LMHeadModel, transformers.PreTrainedTokenizerFast
torch.set_num_threads(1)
for line in sys.stdin:
    argv, env, said = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1), os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.environ.update(env)
        sys.argv = ["01_cache_acts.py", *argv]
        code = 1
        try:
            run_script(script.main)
        except SystemExit as e:
            code = e.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code, file=sys.__stdout__, flush=True)
"""


class Machine:
    """A working folder and an environment, in which the script runs as forks of one process."""

    def __init__(self, folder, **env):
        self.folder = folder
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env = {**clean, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), **env}
        self.process = subprocess.Popen([sys.executable, "-c", FORKS, str(ROOT)], cwd=folder,
                                        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def run(self, *argv, code=0, **env):
        """What the script said; it must end with this exit code."""
        said = self.folder / "said.txt"
        self.process.stdin.write(json.dumps([argv, env, str(said)]) + "\n")
        self.process.stdin.flush()
        ended = int(self.process.stdout.readline())
        assert ended == code, said.read_text()
        return said.read_text()

    def refuses(self, code, *argv, **env):
        """The one line in which the script refuses; nothing is left of the try."""
        before = contents(self.folder / "acts")
        said = self.run(*argv, code=code, **env)
        lines = [line for line in said.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), said
        assert contents(self.folder / "acts") == before
        return lines[0]

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def parquet(path, documents, column):
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), column: documents}),
                                path)


SCRIPTED = """
import datasets
class Words(datasets.GeneratorBasedBuilder):
    def _info(self):
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.DatasetInfo(features=features)
    def _split_generators(self, _):
        return [datasets.SplitGenerator(name="train")]
    def _generate_examples(self):
        for i in range(200):
            yield i, {"text": "w1 w2 w3 " * 10}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name in ("words", "gated"):
        save(folder / "models" / "toys" / name)
    documents, stories = texts(FILES * PER_FILE), folder / "datasets" / "toys" / "stories" / "data"
    for i in range(FILES):
        name = f"train-{i:05d}-of-{FILES:05d}.parquet"
        parquet(stories / name, documents[i * PER_FILE:][:PER_FILE], "story")
    parquet(stories / "test-00000-of-00001.parquet", ["w0 " * 30] * 9, "story")
    letters = folder / "datasets" / "toys" / "letters"
    configs = ""
    for config, word in (("en", "w1"), ("de", "w2")):
        write_jsonl(letters / config / "train.jsonl", [f"{word} " * 30] * 80)
        configs += f"- config_name: {config}\n  data_files: {config}/train.jsonl\n"
    (letters / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Letters\n")
    shutil.copytree(letters, letters.with_name("secret"))
    letters.with_name("scripted").mkdir()
    (letters.with_name("scripted") / "scripted.py").write_text(SCRIPTED)
    accepted = {"hf_anna": {"toys/gated", "toys/secret"}, "hf_bob": set()}
    with Hub(folder, gated={"toys/gated", "toys/secret"}, accepted=accepted) as server:
        yield server


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("online"), HF_ENDPOINT=hub.url)
    yield machine
    machine.end()


@pytest.fixture(scope="module")
def offline(hub, online, tmp_path_factory):
    """Another working folder on the machine that was online before: the hub's cache is there."""
    machine = Machine(tmp_path_factory.mktemp("offline"), HF_ENDPOINT=hub.url,
                      HF_HOME=str(online.folder / "hf"), HF_HUB_OFFLINE="1")
    yield machine
    machine.end()


def shards(folder):
    return [(shard["file"], shard["rows"], shard["checksum"]) for shard in Acts(folder).shards]


def test_a_model_and_data_come_by_name_and_only_what_is_needed_is_fetched(hub, online):
    online.run(*ASK)
    acts, fetched = online.folder / "acts", hub.fetched()
    meta = Acts(acts / "words_l1").meta
    assert meta["model"]["revision"] == hub.commit("models/toys/words")
    assert meta["data"]["revision"] == hub.commit("datasets/toys/stories")
    weights = hub.folder / "models/toys/words/model.safetensors"
    assert fetched["model.safetensors"] == weights.stat().st_size                    # once
    assert [name for name in fetched if name.endswith(".parquet")] == [
        f"train-00000-of-{FILES:05d}.parquet"]
    shutil.copytree(hub.folder / "models/toys/words", online.folder / "words")
    shutil.copytree(hub.folder / "datasets/toys/stories", online.folder / "texts")
    hub.log.clear()
    online.run(*ASK, "--model", "words", "--data", "texts", "--name", "folders")  # the hub's layout
    assert not hub.log and shards(acts / "folders") == shards(acts / "words_l1")


def test_a_configuration_of_data_is_chosen_and_recorded(hub, online):
    ask = [*ASK, "--data", "toys/letters", "--column", "text", "--name", "letters"]
    assert "['en', 'de']" in online.refuses(3, *ask)
    assert "'fr' not found" in online.refuses(3, *ask, "--config", "fr")
    hub.log.clear()
    online.run(*ask, "--config", "de")
    acts = Acts(online.folder / "acts" / "letters")
    assert acts.meta["data"]["config"] == "de" and set(acts.shard(0)["tokens"].tolist()) == {4 + 2}
    assert not [path for _, path, sent in hub.log if path.endswith("en/train.jsonl") and sent]


def test_what_is_wrong_with_the_data_is_said_before_weights_are_fetched(hub, online):
    shutil.rmtree(online.folder / "hf" / "hub" / "models--toys--words", ignore_errors=True)
    hub.log.clear()
    for code, words, argv in [
        (2, "toys/stories, record 1: no column 'body', there are id, story", ["--column", "body"]),
        (3, "Available splits: ['train', 'test']", ["--split", "nothing"]),
        (2, "data set toys/nothing is neither on the hub", ["--data", "toys/nothing"]),
        (4, "data set toys/secret is gated", ["--data", "toys/secret", "--config", "en"])]:
        assert words in online.refuses(code, *ASK, *argv, "--name", "data")
    assert "model.safetensors" not in hub.fetched() and "config.json" in hub.fetched()


def test_what_is_gated_says_what_to_accept_where_and_opens_with_the_token(hub, online):
    model = [*ASK, "--model", "toys/gated"]
    data = [*ASK, "--data", "toys/secret", "--column", "text", "--config", "en", "--name", "secret"]
    for ask, page in ((model, "toys/gated"), (data, "datasets/toys/secret")):
        for token in ({}, {"HF_TOKEN": "hf_bob"}):  # nobody, and somebody who was not accepted
            said = online.refuses(4, *ask, **token)
            assert f"is gated: accept its terms on https://huggingface.co/{page}, then" in said
        assert "the hub does not know the token" in online.refuses(4, *ask, HF_TOKEN="hf_old")
    online.run(*data, HF_TOKEN="hf_anna")
    online.run(*model, HF_TOKEN="hf_anna")
    acts = online.folder / "acts"
    assert Acts(acts / "gated_l1").meta["model"]["revision"] == hub.commit("models/toys/gated")
    assert Acts(acts / "secret").meta["data"]["revision"] == hub.commit("datasets/toys/secret")


def test_what_is_missing_or_out_of_reach_is_said_in_one_line(hub, online):
    for token in ({}, {"HF_TOKEN": "hf_bob"}):
        said = online.refuses(2, *ASK, "--model", "toys/nothing", **token)
        where = "is neither on the hub (or private: set HF_TOKEN) nor a file or folder"
        assert f"model toys/nothing {where}" in said
    online.run(*ASK, "--name", "fetched")
    with hub.closed():
        for argv in (["--model", "toys/other"], [], ["--model", "words"]):
            said = online.refuses(4, *ASK, *argv, "--name", "again")
            assert "the hub is not reachable: check the network" in said


def test_offline_the_hubs_cache_gives_the_same_rows(hub, online, offline):
    online.run(*ASK)
    hub.log.clear()
    assert "data set toys/stories is not in the local cache" in offline.refuses(4, *ASK)
    fetch = [Path(sys.executable).with_name("hf"), "download", "toys/stories", "--repo-type",
             "dataset"]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(online.folder / "hf"),
           "HF_HUB_OFFLINE": "0"}
    subprocess.run(fetch, check=True, capture_output=True, env=env)
    hub.log.clear()
    offline.run(*ASK)
    assert shards(offline.folder / "acts/words_l1") == shards(online.folder / "acts/words_l1")
    said = offline.refuses(4, *ASK, "--model", "toys/other")
    assert "model toys/other is not in the local cache" in said and not hub.log


def test_code_that_comes_with_data_runs_if_remote_code_is_trusted(online):
    ask = ["--model", "toys/words", "--layer", "1", "--data", "toys/scripted", "--name", "s",
           *SMALL]
    # as if the user had always said yes
    said = online.refuses(3, *ask, HF_DATASETS_TRUST_REMOTE_CODE="1")
    assert "toys/scripted" in said and "trust_remote_code" in said
    online.run(*ask, "--trust-remote-code")
    assert (online.folder / "acts/s/meta.json").exists()
