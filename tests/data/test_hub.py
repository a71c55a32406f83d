"""Hub data sets by name, through huggingface_hub itself, from a small hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from gptoss_jax.data import hub
from gptoss_jax.data.hub import splits
from gptoss_jax.errors import UserError

SHA = {"main": "a" * 40, "v1": "b" * 40, "refs/convert/parquet": "c" * 40}
LINE = b'{"text": "fine"}\n'
REPOS = {
    "me/plain": {
        "main": {
            "README.md": b"# hi",
            "data/train-00000-of-00002.jsonl": LINE,
            "data/train-00001-of-00002.jsonl": LINE * 2,
            "data/test-00000-of-00001.jsonl": LINE * 3,
        },
        "v1": {"train.txt": b"old"},
    },
    "me/configs": {
        "main": {f"{c}/{s}.jsonl": LINE for c in ("de", "en") for s in ("train", "dev")}
    },
    "me/json": {
        "main": {"alpaca.json": b"[]"},
        "refs/convert/parquet": {
            "default/train/0000.parquet": b"PAR1",
            "default/partial-test/0000.parquet": b"PAR1",
        },
    },
    "me/pictures": {"main": {"a.png": b"x"}},
    "me/gated": {"main": {"train.jsonl": LINE}},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as listing and downloading data sets takes."""

    def log_message(self, format, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0].replace("%2F", "/")
        api = path.startswith("/api/datasets/")
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        name, (kind, rest) = "/".join(parts[:2]), (parts[2], "/".join(parts[3:]))
        if name not in REPOS:
            return self.answer(404, X_Error_Code="RepoNotFound")
        revisions = {**{sha: REPOS[name].get(r) for r, sha in SHA.items()}, **REPOS[name]}
        revision = next((r for r in revisions if (rest + "/").startswith(r + "/")), None)
        files = revisions[revision] if revision else None
        if revision is None or files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        sha = SHA.get(revision, revision)
        if api and kind == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            siblings = [{"rfilename": p} for p in files]
            found = {"id": name, "sha": sha, "siblings": siblings, "tags": [], "downloads": 0}
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if name == "me/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        body = files[rest[len(revision) + 1 :]]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self.answer(200, body, ETag=etag, X_Repo_Commit=sha)

    do_HEAD = do_GET


SCRIPT = """
import json, sys
from gptoss_jax.data import hub
from gptoss_jax.errors import UserError
for text, field in json.loads(sys.argv[1]):
    try:
        said = [[str(p), p.read_bytes().decode()] for p in hub.fetch(text, field)]
    except UserError as error:
        said = str(error)
    print(json.dumps([text, field, said]))
"""


def ask(names, cache, endpoint, **variables):
    """Fetch in a process of its own, since huggingface_hub reads its variables when imported."""
    full = [name if isinstance(name, tuple) else (name, "data.train") for name in names]
    env = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(full)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {name: json.loads(line)[2] for name, line in zip(names, lines, strict=True)}


PLAIN = REPOS["me/plain"]["main"]
LOGIN = "`hf auth login` or set HF_TOKEN"
NO_SPLIT = "data.train: {}: there is no split {}; it has {}"
# What each name gives: files with their contents, or what is said.
ANSWERS = {
    "hf:me/plain": {name: body for name, body in PLAIN.items() if "train" in name},
    "hf:me/plain@v1": {"train.txt": b"old"},
    ("hf:me/plain:test", "data.held_out"): {"data/test-00000-of-00001.jsonl": LINE * 3},
    "hf:me/configs:en:dev": {"en/dev.jsonl": LINE},
    # What the hub converted, where the names of the files themselves tell no split.
    "hf:me/json": {"default/train/0000.parquet": b"PAR1"},
    "hf:me/plain:dev": NO_SPLIT.format("hf:me/plain:dev", "dev", "test, train"),
    "hf:me/plain@v1:test": NO_SPLIT.format("hf:me/plain@v1:test", "test", "train"),
    "hf:me/plain@v9": "hf:me/plain@v9: it has no revision v9",
    "hf:me/configs": (
        "data.train: hf:me/configs: 2 configs have the split train (de, en); name one: "
        "hf:me/configs:CONFIG:train"
    ),
    "hf:me/configs:fr:train": NO_SPLIT.format(
        "hf:me/configs:fr:train", "train of config fr", "de:dev, de:train, en:dev, en:train"
    ),
    "hf:me/json:test": NO_SPLIT.format("hf:me/json:test", "test", "partial-test, train"),
    "hf:me/pictures": NO_SPLIT.format("hf:me/pictures", "train", "no .parquet, .jsonl or .txt"),
    "hf:me/gated": (
        "hf:me/gated: it is gated: accept its terms on https://huggingface.co/datasets/me/gated, "
        f"then {LOGIN}"
    ),
    "hf:me/unknown": f"hf:me/unknown: the hub has no such data set, or it is private: {LOGIN}",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What each name gave, and the cache that this left."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("hub")
    yield ask(ANSWERS, cache, f"http://127.0.0.1:{server.server_port}"), cache
    server.shutdown()


@pytest.mark.parametrize("name", ANSWERS, ids=str)
def test_a_split_is_downloaded_or_what_the_hub_lacks_is_said(served, name):
    answers, _ = served
    expected, found = ANSWERS[name], answers[name]
    if isinstance(expected, dict):
        assert isinstance(found, list), found
        found = {path.split("/snapshots/")[1][41:]: text.encode() for path, text in found}
        assert list(found) == list(expected)
    assert found == expected


def test_the_cache_serves_without_a_network(served):
    answers, cache = served
    nowhere = "http://127.0.0.1:9"
    names = ["hf:me/plain", "hf:me/json", "hf:me/plain@v1", "hf:me/other", "hf:me/plain:dev"]
    again = ask(names, cache, nowhere, HF_HUB_OFFLINE="1")
    unreached = ask(["hf:me/plain", "hf:me/other"], cache, nowhere)
    for name in names[:3]:
        assert again[name] == answers[name]
    assert unreached["hf:me/plain"] == answers["hf:me/plain"]
    assert "there is no split dev; it has" in again["hf:me/plain:dev"]
    assert again["hf:me/other"] == unreached["hf:me/other"]
    assert again["hf:me/other"] == (
        "hf:me/other: the hub can't be reached and its cache here lacks it: connect, or give the "
        "path of its files"
    )


def test_part_of_a_split_in_the_cache_is_refused(served):
    _, cache = served
    (there,) = (cache / "hub").glob("datasets--me--plain/snapshots/*/data/train-00001*")
    target = os.readlink(there)
    there.unlink()
    (said,) = ask(["hf:me/plain"], cache, "http://127.0.0.1:9", HF_HUB_OFFLINE="1").values()
    there.symlink_to(target)
    assert said == (
        "data.train: hf:me/plain: 1 of the 2 files are there; download the rest with a network"
    )


def test_splits_are_read_from_names():
    found = splits(
        [
            "README.md",
            "train.jsonl",
            "data/test-00000-of-00002.parquet",
            "data/test-00001-of-00002.parquet",
            "data/train_sft-00000-of-00001-a09b74b3ef9c3b56.parquet",
            "en/train/0000.parquet",
            "en/train/0001.parquet",
            "de/validation/part-00001.jsonl",
            "de/validation/words.txt",
            "default/partial-train/0000.parquet",
            ".cache/train.txt",
            "corpus/2019/data.txt",
        ]
    )
    assert found == {
        ("default", "train"): ["train.jsonl"],
        ("default", "test"): [f"data/test-0000{i}-of-00002.parquet" for i in range(2)],
        ("default", "train_sft"): ["data/train_sft-00000-of-00001-a09b74b3ef9c3b56.parquet"],
        ("en", "train"): [f"en/train/000{i}.parquet" for i in range(2)],
        ("de", "validation"): ["de/validation/part-00001.jsonl"],  # one format, the first
        ("default", "partial-train"): ["default/partial-train/0000.parquet"],
        ("corpus", "2019"): ["corpus/2019/data.txt"],
    }


def test_bad_names():
    syntax = "hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]"
    for text in ("hf:", "hf:squad", "hf:a/b/c", "hf:a/b:", "hf:a/b:c:d:e", "hf:a/b@"):
        with pytest.raises(UserError) as error:
            hub.fetch(text, "data.train")
        assert str(error.value) == f"data.train: {text} is no name of a hub data set: {syntax}"
    with pytest.raises(UserError) as error:
        hub.fetch("hf:a/b", "data.held_out")
    assert str(error.value) == (
        "data.held_out: hf:a/b names no split; add it at the end, as in hf:a/b:test"
    )
