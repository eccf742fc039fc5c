from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import lclm.hub.remote
from lclm.cli import main
from lclm.hub.publish import prepare, publish
from lclm.hub.remote import Remote, scrub
from tests.hub.conftest import environment, log_in
from tests.hub.material import make_run
from tests.hub.repos import Blob, Repo
from tests.hub.server import Fault, HubServer

ROOT = Path(__file__).parent.parent.parent
LOAD = """
import json, sys
from tests.model.remote import Without
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
found = {}
for revision in sys.argv[2:]:
    name, at = (sys.argv[1], {"revision": revision}) if revision[:1] != "/" else (revision, {})
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **at).eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **at)
    inputs = processor(text="read <|memory_start|>some text<|memory_end|> and say", return_tensors="pt")
    with torch.no_grad():
        found[revision] = [model(**inputs).logits.double().sum().item()]
    found[revision] += model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
assert not [name for name in sys.modules if name.partition(".")[0] == "lclm"]
print(json.dumps(found))
"""


pytestmark = pytest.mark.usefixtures("one_plot")


def send(run: Path, repo: str = "acme/tiny", **options: Any) -> str:
    """Publish a run by this process. Revisions are prepared once; so cards name another repository."""
    how = {k: options.pop(k) for k in ("private", "collection", "overwrite", "say") if k in options}
    revisions = prepared(run, "acme/tiny", **{k: tuple(v) if k == "tags" else v for k, v in options.items()})
    return publish(revisions, Remote(repo, how.get("say", lambda text: None)), **how)


prepared = functools.cache(prepare)


def test_from_a_run_to_the_hub_and_back(hub: HubServer, published_run: Path, tmp_path: Path) -> None:
    """The command, in a process of its own; then another, without lclm, loads both stages by repository and
    tag. One fault makes huggingface_hub warn of a signed address, which is not to be shown."""
    hub.fail("PUT", "store", status=500)
    lclm = [sys.executable, "-m", "lclm", "publish", str(published_run), "--repo", "acme/tiny"]
    done = subprocess.run(
        [*lclm, "--all-stages", "--tag", "v1.0", "--private", "--license", "apache-2.0"],
        env=environment(hub, tmp_path / "home"), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"published: {hub.url}/acme/tiny"
    assert "HTTP Error 500" in done.stderr and "X-Amz-Signature" not in done.stderr
    assert hub.token not in done.stdout + done.stderr
    repo = hub.repos["acme/tiny"]
    assert repo.private and set(repo.tags) == {"scratch", "adapter", "v1.0"}
    assert repo.tags["adapter"] == repo.tags["v1.0"] == repo.branches["main"] != repo.tags["scratch"]
    assert repo.titles[1:] == ["lclm: made-up, stage scratch", "lclm: made-up, stage adapter"]
    files = repo.files()
    export = published_run / "stages/02-adapter/export"
    for path in export.rglob("*"):
        assert path.is_dir() or files[path.relative_to(export).as_posix()] == path.read_bytes()
    assert files["report/saved.png"].startswith(b"\x89PNG") and b"## Evaluation" in files["README.md"]

    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, "acme/tiny", "scratch", "adapter", str(export.resolve())],
        env=environment(hub, tmp_path / "empty"), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    sums = json.loads(loaded.stdout.splitlines()[-1])
    assert sums["adapter"] == sums[str(export)] != sums["scratch"]


def test_published_again_nothing_is_sent(hub: HubServer, published_run: Path) -> None:
    send(published_run, all_stages=True)
    commits, sent = dict(hub.repos["acme/tiny"].commits), store_bytes(hub)
    said: list[str] = []
    send(published_run, all_stages=True, say=said.append)
    assert dict(hub.repos["acme/tiny"].commits) == commits and store_bytes(hub) == sent
    assert "lclm: made-up, stage scratch: there already" in said


def store_bytes(hub: HubServer) -> int:
    return sum(size for path, size in hub.sent.items() if path.startswith("/store/"))


def weights(run: Path, stage: str = "02-adapter") -> dict[str, int]:
    found = (run / "stages" / stage / "export").glob("*.safetensors")
    return {path.name: path.stat().st_size for path in found}


@pytest.mark.parametrize("part", [None, 100_000])
def test_a_cut_upload_goes_on(
    hub: HubServer, published_run: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch, part: int | None
) -> None:
    """Dropped in its second file for good, it fails; the same command sends what is missing, and no more."""
    monkeypatch.setattr(lclm.hub.remote, "LARGE", 10_000)
    monkeypatch.setattr(lclm.hub.remote, "TRIES", 2)
    hub.part = part
    sizes = weights(published_run)
    assert len(sizes) >= 3
    drop = Fault("PUT", "/store/", drop_after=5_000)
    monkeypatch.setattr(hub, "fault", lambda method, path: drop if method == "PUT" and hub.store else None)
    with pytest.raises(ValueError, match=r"connection was lost.*run the same command again"):
        send(published_run)
    assert len(hub.store) == 1 and hub.repos["acme/tiny"].titles == ["initial commit"]
    arrived = len(next(iter(hub.store.values())))
    monkeypatch.undo()
    log_in(monkeypatch, hub)
    monkeypatch.setattr(lclm.hub.remote, "LARGE", 10_000)
    hub.sent.clear()
    send(published_run)
    large = sum(len(blob.data) for blob in head(hub).values() if blob.large)
    assert store_bytes(hub) - complete_bytes(hub) == large - arrived
    assert {path for path in head(hub) if path.endswith(".safetensors")} == set(sizes)


def head(hub: HubServer, repo: str = "acme/tiny") -> dict[str, Blob]:
    found = hub.repos[repo]
    return found.commits[found.branches["main"]]


def complete_bytes(hub: HubServer) -> int:
    return sum(size for path, size in hub.sent.items() if path.endswith("/complete"))


FAULTS = {
    "429 for whom": ("GET", "whoami", {"status": 429, "headers": {"Retry-After": "7"}}),
    "500 for the repository": ("POST", "repos/create", {"status": 500, "times": 2}),
    "repository made, answer lost": ("POST", "repos/create", {"drop_after": 0, "after": True}),
    "503 in preupload": ("POST", "preupload", {"status": 503}),
    "429 in batch": ("POST", "batch", {"status": 429, "headers": {"Retry-After": "7"}}),
    "dropped in a file": ("PUT", "store", {"drop_after": 50_000, "times": 2}),
    "500 for a file": ("PUT", "store", {"status": 500}),
    "verify fails": ("POST", "verify", {"status": 502}),
    "502 for the commit": ("POST", "/commit/", {"status": 502, "times": 2}),
    "committed, answer lost": ("POST", "/commit/", {"drop_after": 0, "after": True}),
    "tagged, answer lost": ("POST", "/tag/", {"drop_after": 0, "after": True}),
    "429 for the collection": ("POST", "collections", {"status": 429, "headers": {"Retry-After": "7"}}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass(hub: HubServer, published_run: Path, naps: list[float], name: str) -> None:
    method, path, how = FAULTS[name]
    hub.fail(method, path, **how)
    send(published_run, collection="Family")
    assert not any(fault.times for fault in hub.faults), "the fault never came"
    repo = hub.repos["acme/tiny"]
    assert len(repo.commits) == 2 and repo.tags == {"adapter": repo.branches["main"]}
    assert [item["id"] for found in hub.collections.values() for item in found["items"]] == ["acme/tiny"]
    assert naps
    if "Retry-After" in how.get("headers", {}):
        assert 7 <= naps[0] <= 8, "as long as the server asked"


def test_what_cannot_be_helped_is_said_plainly(
    hub: HubServer, published_run: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str, repo: str = "acme/tiny", **options: Any) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            send(published_run, repo, **options)
        assert hub.token not in str(caught.value)

    refused("give the owner too", repo="tiny")
    refused("--repo a/b/c", repo="a/b/c")
    refused("no right to write there as ada", repo="stranger/tiny")
    hub.role = "read"
    refused("the token of ada may only read")
    hub.role = "write"
    hub.fail("POST", "repos/create", status=500, times=99, message="with {authorization} in it")
    refused("still answers 500 after 6 tries")
    hub.faults.clear()
    hub.fail("POST", "/commit/", status=403, message="Bearer token {authorization} is not enough")
    refused("no right to write there")
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrongtokenwrongtoken")
    refused("not allowed: the token is missing, wrong or expired.*hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no token for")
    assert list(hub.repos) == ["acme/tiny"] and not hub.repos["acme/tiny"].tags


def test_a_hub_without_xet_is_said_to_be_one(
    hub: HubServer, published_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ValueError, match=r"has no Xet storage .*404.*; set HF_HUB_DISABLE_XET=1"):
        send(published_run)


def test_secrets_are_not_shown(
    hub: HubServer, published_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in errors, with and without --debug, nor in what is sent."""
    monkeypatch.setenv("COLUMNS", "1000")
    for debug in ([], ["--debug"]):
        hub.fail("POST", "/commit/", status=403, message="you sent {authorization}, go away")
        with pytest.raises(SystemExit):
            main(["publish", str(published_run), "--repo", f"acme/s{len(debug)}", *debug])
        shown = capsys.readouterr()
        assert "you sent" in shown.err and "go away" in shown.err
        assert hub.token not in shown.out + shown.err
    for repo in hub.repos.values():
        assert all(hub.token.encode() not in data for data in repo.files().values())
    assert scrub("Bearer abc, https://u:p@x/y?sig=1 hf_abcdefghijk") == (
        "Bearer ***, https://***@x/y?*** hf_***"
    )


def test_a_dry_run_touches_no_socket(
    hub: HubServer, published_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was used")

    before = {path: path.stat().st_mtime_ns for path in published_run.rglob("*")}
    command = ["publish", str(published_run), "--repo", "acme/tiny", "--dry-run", "--all-stages", "--private"]
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "connect", no)
        patched.setattr(socket, "getaddrinfo", no)
        patched.delenv("HF_TOKEN")
        main_ok(command)
    shown = capsys.readouterr().out
    assert "stage scratch" in shown and "tags adapter" in shown and "(private)" in shown
    assert "base_model:" in shown and all(name in shown for name in weights(published_run))
    assert not hub.requests
    assert before == {path: path.stat().st_mtime_ns for path in published_run.rglob("*")}

    send(published_run, all_stages=True, private=True)
    for path, data in hub.repos["acme/tiny"].files().items():
        assert path == ".gitattributes" or f"{len(data):>16,}  {path}\n" in shown, path


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


def test_a_family_is_one_collection(hub: HubServer, published_run: Path) -> None:
    for repo in ("acme/tiny-4x", "acme/tiny-8x", "acme/tiny-4x"):
        send(published_run, repo, collection="Tiny LCLMs")
    (found,) = hub.collections.values()
    assert found["title"] == "Tiny LCLMs" and found["owner"]["name"] == "acme"
    assert [item["id"] for item in found["items"]] == ["acme/tiny-4x", "acme/tiny-8x"]


def test_others_models_are_not_replaced(hub: HubServer, published_run: Path, tmp_path: Path) -> None:
    theirs = hub.repos["acme/theirs"] = Repo(private=False)
    files = {name: Blob(b"theirs", False) for name in ("pytorch_model.bin", "LICENSE.md", "vocab.txt")}
    theirs.commit(files, "mine")
    with pytest.raises(ValueError, match=r"holds a model that lclm did not publish.*--overwrite"):
        send(published_run, "acme/theirs")
    with pytest.raises(ValueError, match="is public"):
        send(published_run, "acme/theirs", private=True)
    assert theirs.titles == ["mine"]
    send(published_run, "acme/theirs", overwrite=True)
    now = set(theirs.files())
    assert "LICENSE.md" in now and "pytorch_model.bin" not in now and "vocab.txt" not in now

    send(published_run, "acme/ours")
    other = make_run(tmp_path / "run", recipe={"seed": 8})
    with pytest.raises(ValueError, match=r"holds another model \(its run differs\)"):
        send(other, "acme/ours", tags=["v2"])
    with pytest.raises(ValueError, match=r"tag adapter names another checkpoint.*--overwrite to move it"):
        send(published_run, "acme/ours", layout="released")
    send(published_run, "acme/ours", layout="released", overwrite=True)
    ours = hub.repos["acme/ours"]
    assert ours.tags["adapter"] == ours.branches["main"]
    kept = {path for path in ours.files() if "/" not in path}
    assert kept == {".gitattributes", "README.md", "publication.json", "recipe.yaml", "model_config.json"}
    assert not (published_run / "publish").exists() or not list((published_run / "publish").iterdir())


def test_what_cannot_be_published(published_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        prepare(tmp_path / "nowhere", "acme/tiny")
    with pytest.raises(ValueError, match="no stage is complete yet"):
        prepare(tmp_path, "acme/tiny")
    with pytest.raises(ValueError, match="unknown complete stage 'scratched'; did you mean 'scratch'"):
        prepare(published_run, "acme/tiny", stage="scratched")
    with pytest.raises(ValueError, match="--tag a b"):
        prepare(published_run, "acme/tiny", tags=["a b"])
    with pytest.raises(ValueError, match="published as it is"):
        prepare(published_run / "stages/01-scratch/export", "acme/tiny", layout="released")


def test_an_exported_folder_is_published_as_it_is(hub: HubServer, published_run: Path) -> None:
    export = published_run / "stages/01-scratch/export"
    send(export, "ada/mine", tags=["v0.1"])
    repo = hub.repos["ada/mine"]
    assert set(repo.tags) == {"v0.1"} and not repo.private
    record = json.loads(repo.files()["publication.json"])
    assert record["model"]["run"] is None and "config.json" in record["files"]
