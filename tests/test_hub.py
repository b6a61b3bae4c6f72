"""Where a model comes from: the Hub at one commit, its cache, a local folder; and the one line that says why it cannot.

The Hub is a server on loopback that answers as huggingface.co does, so that the real client downloads, caches and fails.
Its address and its cache are read when the client is imported: these runs are processes of their own, of several runs
each, because importing torch and transformers takes longer than all the rest.
"""
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import filelock
import pytest
import torch
from models import as_pickle, change_config, change_weights

import image_text_sim_clip as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "challenge_set/shapes_clip"
BUNDLED_COMMAND = "python image_text_sim_clip.py --config challenge_set/demo.yaml"


# ── A Hub on loopback ─────────────────────────────────────────────────────────────────────────────────────────────────

class FakeHub:
    """Repositories of one or more revisions, served the way huggingface.co serves them: weights by way of a redirect."""

    def __init__(self):
        self.repositories, self.requests, self.broken = {}, [], set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.requests.append(self.path)
                status, headers, body = hub.answer(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
            do_HEAD = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, name, folder, revision="main"):
        """Serve `folder` as a revision of the repository `name` and return its commit."""
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        files = {path.name: path for path in folder.iterdir()}
        self.repositories.setdefault(name, {}).update({revision: (commit, files), commit: (commit, files)})
        return commit

    def answer(self, path):
        """Status, headers and body for a path."""
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            commit, files = self.repositories["/".join(parts[1:3])][parts[3]]
            return (403, {}, b"") if path in self.broken else self._file(commit, files[parts[4]])
        api = parts[:2] == ["api", "models"]
        if len(parts) < 5:
            return 404, {}, b""  # whatever else the client asks its Hub for
        name, (what, *rest) = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if rest[0] not in self.repositories[name]:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {rest[0]}"}, b"{}"
        commit, files = self.repositories[name][rest[0]]
        if what == "revision":
            return self._json({"_id": "0" * 24, "id": name, "modelId": name, "sha": commit, "private": False, "tags": [],
                               "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in sorted(files)]})
        if what == "tree":
            return self._json([{"type": "file", "path": file, "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                                "size": path.stat().st_size} for file, path in sorted(files.items())])
        if what != "resolve" or rest[1] not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}, b""
        status, headers, body = self._file(commit, files[rest[1]])
        if rest[1].endswith((".safetensors", ".bin")):
            return 302, {**headers, "X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(body)),
                         "Location": f"{self.endpoint}/cdn/{name}/{commit}/{rest[1]}"}, b""
        return status, headers, body

    @staticmethod
    def _file(commit, path):
        body = path.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body

    @staticmethod
    def _json(content):
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def stop(self):
        """Close the port: whoever asks is refused at once."""
        self.server.shutdown()
        self.server.server_close()


class Evil:
    """A pickle that makes a folder where it is loaded by whoever lets pickles run code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# Runs the script as its command line does, once for each argument list on stdin, each with its own stderr and stdout.
DRIVER = """
import json, os, sys, tempfile
import image_text_sim_clip as script
from addons.results import memory_curve
memory_curve.MemoryCurve = lambda clock: None
kept, outcomes = (os.dup(1), os.dup(2)), []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv = ["image_text_sim_clip.py", *arguments]
        try:
            script.run()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        out.seek(0), err.seek(0)
        outcomes.append((code, out.read().decode(), err.read().decode()))
print(json.dumps(outcomes))
"""


def environment(hub, cache, **changes):
    """This process's, with the fake Hub's address and a cache of its own, and no proxy on the way to them."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_")) and "proxy" not in k.lower()}
    return {**ours, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), **changes}


@dataclasses.dataclass
class Story:
    """What became of the runs below: `outcomes` label -> (exit code, stdout, stderr), `requests` label -> paths asked for.

    `commits` has the commit of each revision served; the runs' outputs lie in `root`.
    """

    root: pathlib.Path
    commits: dict
    outcomes: dict = dataclasses.field(default_factory=dict)
    requests: dict = dataclasses.field(default_factory=dict)

    def run(self, hub, process, *runs, **changes):
        """One process, called `process` in `requests`, for several runs, each (label, model, keys)."""
        before = len(hub.requests)
        command_lines = []
        for label, model, keys in runs:
            keys = {"pretrained_model": model, "output_path": self.root / label, "limit": 3, "use_cuda": "false", **keys}
            overrides = (f"--set={key}={value}" for key, value in keys.items())
            command_lines.append(["--config", str(ROOT / "challenge_set/demo.yaml"), *overrides])
        done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(command_lines), capture_output=True, cwd=ROOT,
                              encoding="utf-8", env=environment(hub, self.root / "cache", **changes), timeout=110)
        assert (done.returncode, done.stderr) == (0, "")
        self.outcomes.update(zip((label for label, *_ in runs), json.loads(done.stdout), strict=True))
        self.requests[process] = hub.requests[before:]

    def written(self, label, name):
        """A JSON file of a run's output."""
        return json.loads((self.root / label / name).read_text(encoding="utf-8"))

    def resolved(self, label):
        """What a run's manifest says of its model."""
        return self.written(label, "manifest.json")["resolved"]


def serve(hub, shelf, root):
    """Give the Hub its repositories, all made of the bundled model, and return their commits."""
    names = ["both", "older", "pickle", "refused", "evil", "flaky", "tuned-whole"]
    folders = {name: shelf.copy(BUNDLED, root / "repositories" / name) for name in names}
    for name in ("older", "flaky"):
        change_weights(folders[name], lambda weights: weights["text_projection.weight"].neg_())
    weights = (folders["both"] / "model.safetensors").read_bytes()
    as_pickle(folders["both"])  # most published repositories have both
    (folders["both"] / "model.safetensors").write_bytes(weights)
    as_pickle(folders["pickle"])
    as_pickle(folders["refused"])
    (folders["evil"] / "model.safetensors").unlink()
    torch.save({"logit_scale": Evil(root / "evil-was-here")}, folders["evil"] / "pytorch_model.bin")
    write_adapters(folders["tuned-whole"], root / "repositories" / "tuned")
    folders["open-clip"] = root / "repositories" / "open-clip"
    folders["open-clip"].mkdir()
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        (folders["open-clip"] / file).write_text("{}")
    folders["tuned"] = root / "repositories" / "tuned"
    commits = {name: hub.add(f"some-one/{name}", folder) for name, folder in folders.items() if name != "older"}
    commits["older"] = hub.add("some-one/both", folders["older"], "v0.9")
    hub.broken.add(f"/cdn/some-one/flaky/{commits['flaky']}/model.safetensors")
    return commits


def write_adapters(whole, alone):
    """Put an adapter next to its base model into `whole`, and the same one into `alone`, where it names some-one/both."""
    import peft
    import transformers
    torch.manual_seed(0)
    model = transformers.CLIPModel.from_pretrained(BUNDLED, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(alone)
    change_config(alone, lambda content: content.update(base_model_name_or_path="some-one/both"), "adapter_config.json")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / name, whole)


def tell_story(root, shelf):
    """Run the script while the Hub answers, in offline mode, and after the Hub has gone, always with the same cache."""
    hub = FakeHub()
    story = Story(root, serve(hub, shelf, root))
    # the failed download comes first: loading a model silences some of the libraries' talk
    story.run(hub, "online", ("flaky", "some-one/flaky", {}), ("both", "some-one/both", {}),
              ("older", "some-one/both", {"revision": "v0.9"}),
              ("by-commit", "some-one/both", {"revision": story.commits["older"]}), ("pickle", "some-one/pickle", {}),
              ("refused", "some-one/refused", {"safetensors_only": "true"}), ("evil", "some-one/evil", {}),
              ("no-such-revision", "some-one/both", {"revision": "v9"}), ("no-such-model", "some-one/nothing", {}),
              ("tuned", "some-one/tuned", {}), ("tuned-whole", "some-one/tuned-whole", {}),
              ("open-clip", "some-one/open-clip", {}))
    story.run(hub, "local", ("local", BUNDLED, {}))
    story.run(hub, "offline", ("offline", "some-one/both", {}), ("offline-nothing", "some-one/nothing", {}), HF_HUB_OFFLINE="1")
    hub.stop()
    story.run(hub, "gone", ("gone-both", "some-one/both", {}), ("gone-tuned", "some-one/tuned", {}),
              ("gone-older", "some-one/both", {"revision": "v0.9"}), ("gone-pickle", "some-one/pickle", {}),
              ("gone-flaky", "some-one/flaky", {}), ("gone-refused", "some-one/pickle", {"safetensors_only": "true"}))
    return story


@pytest.fixture(scope="session")
def story(tmp_path_factory, shelf):
    """The story, told once: of several test processes the first tells it and the others read it from a file."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tell_story(tmp_path_factory.mktemp("hub"), shelf)
    root = tmp_path_factory.getbasetemp().parent / "hub"
    with filelock.FileLock(f"{root}.lock"):
        if not (root / "story.json").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            told = dataclasses.asdict(tell_story(root, shelf)) | {"root": str(root)}
            (root / "story.json").write_text(json.dumps(told), encoding="utf-8")
        told = json.loads((root / "story.json").read_text(encoding="utf-8"))
    return Story(**{**told, "root": root})


def assert_refused(outcome, *parts):
    """Exit 6, nothing on stdout, and on stderr one line that holds `parts`."""
    code, stdout, stderr = outcome
    assert (code, stdout) == (6, ""), stderr
    assert re.fullmatch(r"error: [^\r\n]+\n", stderr), stderr
    for part in parts:
        assert part in stderr


# ── The Hub answers ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_a_hub_id_is_downloaded_and_its_commit_recorded(story):
    """A Hub id is scored, and manifest.json and profile.json name the commit, not only the branch."""
    code, stdout, stderr = story.outcomes["both"]
    assert code == 0, stderr
    assert json.loads(stdout)["scored"] == 3
    assert "warning" not in stderr
    assert story.resolved("both")["weights"] == story.commits["both"]
    profile = story.written("both", "profile.json")
    assert (profile["model"], profile["revision"], profile["weights"]) == ("some-one/both", "main", story.commits["both"])


@pytest.mark.slow
def test_of_both_formats_only_safetensors_is_downloaded(story):
    """Where a revision has model.safetensors, pytorch_model.bin is not fetched."""
    fetched = [path for path in story.requests["online"] if path.startswith("/cdn/some-one/both/")]
    assert {path.rsplit("/", 1)[-1] for path in fetched} == {"model.safetensors"}


@pytest.mark.slow
def test_a_local_folder_scores_the_same_and_asks_nobody(story, read_table):
    """The same files in a local folder score as they do from the Hub, and the Hub gets no request for it."""
    assert story.outcomes["local"][0] == 0, story.outcomes["local"]
    assert story.requests["local"] == []
    local = read_table(story.root / "local/scores.csv")
    assert len(local) == 3
    assert read_table(story.root / "both/scores.csv") == local
    assert read_table(story.root / "pickle/scores.csv") == local


@pytest.mark.slow
@pytest.mark.parametrize("label", ["older", "by-commit"])
def test_a_revision_is_another_model(label, story, read_table):
    """`revision` takes a tag, or the commit it stands for, and gets that revision's weights."""
    assert story.outcomes[label][0] == 0, story.outcomes[label]
    assert story.resolved(label)["weights"] == story.commits["older"]
    older, newer = (read_table(story.root / name / "scores.csv") for name in (label, "both"))
    assert [float(row["similarity"]) for row in older] == [-float(row["similarity"]) for row in newer]


@pytest.mark.slow
def test_a_repository_of_pickles_works_with_one_warning(story):
    """Without safetensors pytorch_model.bin is read, and one line warns of it."""
    code, stdout, stderr = story.outcomes["pickle"]
    assert code == 0, stderr
    assert json.loads(stdout)["scored"] == 3
    warnings = [line for line in stderr.splitlines() if "warning" in line.lower()]
    assert len(warnings) == 1
    assert "some-one/pickle" in warnings[0]
    assert "pytorch_model.bin" in warnings[0]
    assert story.resolved("pickle")["weights"] == story.commits["pickle"]


@pytest.mark.slow
def test_safetensors_only_refuses_pickles(story):
    """With `safetensors_only: true` such a repository is refused in one line, and before its weights are downloaded."""
    assert_refused(story.outcomes["refused"], "some-one/refused", "safetensors_only")
    assert not [path for path in story.requests["online"] if path.startswith("/cdn/some-one/refused/")]


@pytest.mark.slow
def test_a_malicious_pickle_does_not_run(story, tmp_path):
    """A pytorch_model.bin that would run code is refused, and its code has not run."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "it-works")))
    assert (tmp_path / "it-works").is_dir(), "this pickle does nothing, so the test shows nothing"
    code, stdout, stderr = story.outcomes["evil"]
    warning, error = stderr.splitlines(keepends=True)
    assert warning.startswith("warning: ")
    assert_refused((code, stdout, error), "some-one/evil")
    assert [path for path in story.requests["online"] if path.startswith("/cdn/some-one/evil/")], "it was never downloaded"
    assert not (story.root / "evil-was-here").exists()


@pytest.mark.slow
def test_an_unknown_revision_or_model_is_refused(story):
    """A revision or a repository that the Hub does not know is one line that says so and names the bundled model."""
    assert_refused(story.outcomes["no-such-revision"], "some-one/both", "v9", "RevisionNotFound", BUNDLED_COMMAND)
    assert_refused(story.outcomes["no-such-model"], "some-one/nothing", "RepositoryNotFound", BUNDLED_COMMAND)


@pytest.mark.slow
def test_a_download_that_fails_is_refused(story):
    """Weights that the Hub does not deliver are one line, without the remains of progress bars."""
    assert_refused(story.outcomes["flaky"], "some-one/flaky", BUNDLED_COMMAND)


@pytest.mark.slow
def test_an_adapter_on_the_hub_brings_its_weights_along(story, read_table):
    """An adapter alone is merged into the base that it names, as one next to its base is; both commits are recorded."""
    for label in ("tuned", "tuned-whole"):
        assert story.outcomes[label][0] == 0, story.outcomes[label]
        assert story.resolved(label)["adapter"] is True
    scores = {label: [float(row["similarity"]) for row in read_table(story.root / label / "scores.csv")]
              for label in ("tuned", "tuned-whole", "both")}
    assert scores["tuned"] == scores["tuned-whole"]
    assert max(abs(a - b) for a, b in zip(scores["tuned"], scores["both"], strict=True)) > 1e-3
    assert story.resolved("tuned")["weights"] == f"{story.commits['tuned']} on {story.commits['both']}"
    assert story.resolved("tuned-whole")["weights"] == story.commits["tuned-whole"]


@pytest.mark.slow
def test_open_clips_config_without_a_model_is_told(story):
    """A repository in open_clip's format is refused by the word that its config lacks (test_open_clip_found.py scores one)."""
    assert_refused(story.outcomes["open-clip"], "some-one/open-clip", "open_clip_config.json lacks model_cfg")


# ── The Hub does not answer ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize(("label", "before"), [
    ("offline", "both"), ("gone-both", "both"), ("gone-older", "older"), ("gone-pickle", "pickle"), ("gone-tuned", "tuned")])
def test_without_the_hub_the_cache_is_used(label, before, story, read_table):
    """In offline mode, or with the Hub gone, what was downloaded before scores the same, whatever its revision and format."""
    code, _, stderr = story.outcomes[label]
    assert code == 0, stderr
    assert story.resolved(label) == story.resolved(before)
    assert read_table(story.root / label / "scores.csv") == read_table(story.root / before / "scores.csv")


@pytest.mark.slow
def test_in_offline_mode_nobody_is_asked(story):
    """HF_HUB_OFFLINE means no request at all, although the Hub would answer."""
    assert story.requests["online"]
    assert story.requests["offline"] == []


@pytest.mark.slow
def test_in_offline_mode_a_model_that_is_not_cached_is_refused(story):
    """With HF_HUB_OFFLINE and nothing cached one line says that it is set, and names the bundled model."""
    assert_refused(story.outcomes["offline-nothing"], "some-one/nothing", "HF_HUB_OFFLINE", BUNDLED_COMMAND)


@pytest.mark.slow
def test_safetensors_only_also_holds_for_the_cache(story):
    """A cached pickle is refused by `safetensors_only` as a downloaded one is."""
    assert_refused(story.outcomes["gone-refused"], "some-one/pickle", "safetensors_only")


@pytest.mark.slow
def test_half_a_download_is_no_model(story):
    """A cached snapshot whose weights never arrived is refused in one line."""
    assert_refused(story.outcomes["gone-flaky"], "some-one/flaky", BUNDLED_COMMAND)


@pytest.mark.slow
def test_nothing_cached_and_nobody_there_is_said_at_once(tmp_path, run_cli):
    """The plain command without Hub and cache ends with exit 6 in seconds, in one line: what was tried, what to run instead."""
    hub = FakeHub()
    hub.stop()
    started = time.monotonic()
    outcome = run_cli("--config", ROOT / "config.yaml", "--set=use_cuda=false", f"--set=output_path={tmp_path / 'out'}",
                      cwd=ROOT, env=environment(hub, tmp_path / "cache", HF_HUB_OFFLINE="0", NO_PROXY="*"))
    assert time.monotonic() - started < 30
    assert_refused((outcome.code, outcome.stdout, outcome.stderr), "openai/clip-vit-base-patch32", "the folder", "the Hub",
                   "the local cache", BUNDLED_COMMAND)


# ── Local folders ─────────────────────────────────────────────────────────────────────────────────────────────────────

def without_weights_of(*names):
    """A change that removes some weights from model.safetensors."""
    def remove(folder):
        change_weights(folder, lambda weights: [weights.pop(name) for name in names])
    return remove


def with_config(name="config.json", **keys):
    """A change of one of the folder's JSON files; a dict is merged into the one that is there."""
    def change(folder):
        def merge(content):
            for key, value in keys.items():
                content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
        change_config(folder, merge, name)
    return change


def cut_weights(folder):
    """Lose the end of model.safetensors."""
    os.truncate(folder / "model.safetensors", 100_000)


def with_processor(**keys):
    """A change of the image processor's settings."""
    return with_config("processor_config.json", image_processor=keys)


BROKEN = {
    "only a pickle": (as_pickle, ["model.safetensors", "a pickle can run code"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), []),
    "weights cut short": (cut_weights, []),
    "weights of another shape": (with_config(projection_dim=32), []),
    "a weight missing": (without_weights_of("text_projection.weight"), ["lacks weights", "text_projection.weight"]),
    "many weights missing": (without_weights_of(*(f"text_model.encoder.layers.1.mlp.fc{i}.{kind}" for i in (1, 2)
                                                  for kind in ("weight", "bias"))), ["lacks weights", "mlp.fc1.bias"]),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], []),
    "no image processor": (lambda folder: (folder / "processor_config.json").unlink(), []),
    "another kind of model": (with_config(model_type="bert", text_config={}, vision_config={}), ["'bert'", "CLIP and SigLIP"]),
    "a kind nobody knows": (with_config(model_type="no-such-kind"), []),
    "another end of text": (with_config(text_config={"eos_token_id": 5}), ["id 5", "id 601"]),
    "a word above the end of text that is pooled at the largest id": (
        with_config(text_config={"eos_token_id": 2}), ["id 601"]),  # with the change of the tokenizer below
    "a resize nobody knows": (with_processor(size={"shortest_edge": 64, "longest_edge": 80}), ["resize"]),
}


def add_word_above_end_of_text(folder):
    """Give the tokenizer one more id than its end of text, and the model a place for it."""
    change_config(folder, lambda tokenizer: tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 602, "content": "<my-cat>", "special": False}), "tokenizer.json")
    with_config(text_config={"vocab_size": 603})(folder)
    name = "text_model.embeddings.token_embedding.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.cat([weights[name], weights[name][:1]])}))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_local_folder_is_refused(what, shelf, tmp_path, run_main, shapes):
    """A local folder that would give no scores, or wrong ones, is exit 6 and one line that names it."""
    change, parts = BROKEN[what]
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    if "above" in what:
        add_word_above_end_of_text(folder)
    change(folder)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    assert_refused((outcome.code, outcome.stdout, outcome.stderr), *parts, *([] if "resize" in what else ["a-model"]))


def test_a_word_above_the_end_of_text_is_fine_where_the_config_names_the_end(shelf, tmp_path, run_main, shapes):
    """The folder refused above for pooling at the largest id is scored once its config gives the true end of text."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    add_word_above_end_of_text(folder)
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    assert (outcome.code, outcome.result["scored"]) == (0, 2), outcome.stderr


@pytest.mark.parametrize(("name", "gone"), [
    ("clip-base-patch32", ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")),
    ("clip-new-eos", ("tokenizer*",)), ("siglip-base", ("spiece.model",)), ("siglip2-base", ("tokenizer*",)),
    ("siglip2-base", ("tokenizer.json",))])
def test_a_folder_without_its_vocabulary_is_refused(name, gone, shelf, tmp_path, run_main, shapes):
    """Where transformers would make do with a tokenizer that knows no word, so that all captions are one, it is exit 6."""
    folder = shelf.copy(name, tmp_path / "a-model")
    for path in [path for pattern in gone for path in folder.glob(pattern)]:
        path.unlink()
    outcome = run_main("--config", shapes(pretrained_model=str(folder), rows=2))
    assert_refused((outcome.code, outcome.stdout, outcome.stderr), "a-model")


def test_a_token_without_an_embedding_is_refused(shelf, tmp_path, run_main, write_config, write_table, picture_bytes):
    """A tokenizer with more ids than the model has embeddings is exit 6, not an IndexError at the first caption with one."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    change_config(folder, lambda tokenizer: tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 602, "content": "<my-cat>", "special": False}), "tokenizer.json")
    config = write_config(csv_path=str(write_table("url,caption\na.png,a <my-cat>\n")), pretrained_model=str(folder))
    (tmp_path / "pictures/a.png").write_bytes(picture_bytes())
    outcome = run_main("--config", config)
    assert_refused((outcome.code, outcome.stdout, outcome.stderr), "a-model")


@pytest.mark.parametrize("name", ["no-such-folder", "./no-such-folder", "a/b/c", "a b/c", "", "..", "openai/",
                                  "/no/such/folder"])
def test_a_name_that_is_none_is_refused(name, run_main, shapes, tmp_path, monkeypatch):
    """What is neither a folder nor owner/name is one line with the bundled command, and the Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    outcome = run_main("--config", shapes(pretrained_model=name, rows=2))
    assert_refused((outcome.code, outcome.stdout, outcome.stderr))


def test_an_address_is_no_model(run_main, shapes):
    """A web address is one line as well; it is a mistake in the config, as for every path that is not local."""
    outcome = run_main("--config", shapes(pretrained_model="https://huggingface.co/openai/clip", rows=2))
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1 and "https://" in outcome.stderr


def test_a_model_trained_again_is_another_model(shelf, tmp_path, run_main, shapes):
    """The fingerprint of a local folder changes with its weights and with its config, and not with its name."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")

    def fingerprint():
        return script.find_model(script.Config(pretrained_model=str(folder))).identity
    first = fingerprint()
    assert first == script.find_model(script.Config(pretrained_model=str(BUNDLED))).identity
    change_weights(folder, lambda weights: [value.mul_(1.001) for value in weights.values() if value.is_floating_point()])
    second = fingerprint()
    with_config(logit_scale_init_value=1.0)(folder)
    assert len({first, second, fingerprint()}) == 3


def test_a_run_is_not_resumed_with_other_weights(shelf, tmp_path, run_main, shapes):
    """A half-finished output folder is refused (exit 2) when the model in the folder has been trained again since."""
    folder = shelf.copy(BUNDLED, tmp_path / "a-model")
    config = shapes(pretrained_model=str(folder), rows=6, partition_rows=3)
    assert run_main("--config", config).code == 0
    (tmp_path / "out/parts/part-00001.parquet").unlink()
    shutil.copy(tmp_path / "out/manifest.json", tmp_path / "manifest-before.json")
    change_weights(folder, lambda weights: [value.mul_(1.001) for value in weights.values() if value.is_floating_point()])
    outcome = run_main("--config", config)
    assert outcome.code == 2
    assert "model.safetensors has changed" in outcome.stderr
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "manifest-before.json").read_bytes()
