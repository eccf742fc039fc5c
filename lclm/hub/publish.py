"""`lclm publish`: checkpoints of a run, or an exported folder, as revisions of a repository on the Hub.

A revision is one commit with the checkpoint's files, the card, the run's plots and recipe, and
`publication.json`, which says which model and files lclm put there: by it a later call knows its own files
from others'. Nothing is kept beside the folder: the Hub says what it has already, so the same command goes on
where an upload was cut off.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lclm import __version__
from lclm.checkpoint import RunFolder, read_json, sha256
from lclm.eval.plots import draw_png
from lclm.hub.card import write_card
from lclm.hub.export import export_run, find_checkpoint, find_export, layout_of, stages_done
from lclm.hub.facts import Facts, gather
from lclm.hub.metadata import CardOptions
from lclm.hub.remote import Remote
from lclm.settings import to_yaml

SCHEMA = 1
RECORD = "publication.json"
PLOTS = ("saved", "continuation", "reconstruction", "needles", "loss", "validation")
BESIDE = ("README.md", RECORD, "recipe.yaml", "report/")
"""What a revision has beside the checkpoint; it may change without the model being another."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
KEPT = re.compile(r"\.gitattributes|(?i:licen[cs]e|notice)[^/]*")
"""What is never removed from a repository."""
MAIN = "main"
TAG = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")


@dataclass(frozen=True)
class Revision:
    """One commit to be. files: {path there: file here, or content}. model: what tells it from others."""

    title: str
    files: dict[str, Path | bytes]
    tags: tuple[str, ...]
    model: dict[str, Any]
    made: Path | None = None  # a folder that was exported for this, and is removed when it is published

    @property
    def card(self) -> str:
        """The text of README.md."""
        content = self.files["README.md"]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")

    @property
    def checkpoint(self) -> dict[str, Path | bytes]:
        """The files of the checkpoint alone."""
        return {path: content for path, content in self.files.items() if not path.startswith(BESIDE)}

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(_size(content) for content in self.files.values())


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def prepare(
    source: Path,
    repo: str,
    *,
    stage: str | None = None,
    all_stages: bool = False,
    layout: str = "native",
    dtype: str | None = None,
    tags: Iterable[str] = (),
    options: CardOptions | None = None,
    local: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Revision]:
    """What is to be published, in order; the last is what readers get without naming a revision.

    source: a run folder (its last complete stage, `stage`, or all of them, each tagged with its name) or an
    exported one. layout, dtype, progress: see export_run. local: no network at all, so that data sets that
    lie elsewhere are not on the card; otherwise their manifests are read. Raises ValueError for what is not
    there or does not go.
    """
    options, tags = options or CardOptions(), tuple(tags)
    if wrong := [tag for tag in tags if not TAG.fullmatch(tag) or tag == MAIN]:
        raise ValueError(f"--tag {wrong[0]}: use letters, digits and . _ + - (not main)")
    if not source.is_dir():
        raise ValueError(f"{source}: there is no such folder; give a run folder or an exported checkpoint")
    if layout_of(source) is not None:
        if stage or all_stages or layout != "native" or dtype:
            raise ValueError(
                f"{source} is an exported checkpoint, published as it is: --stage, --all-stages, --layout "
                "and --dtype are for run folders"
            )
        return [_revision(gather(source), source, repo, tags, options)]
    if stage and all_stages:
        raise ValueError("give one of --stage and --all-stages")
    find_export(source, stage)
    done = list(stages_done(RunFolder(source)))
    chosen = done if all_stages else [stage or done[-1]]
    revisions = []
    for name in chosen:
        folder, made = _checkpoint(source, name, layout, dtype, progress)
        own = name if name != MAIN else f"stage-{name}"
        named = (own, *tags) if name == chosen[-1] else (own,)
        revision = _revision(gather(folder, source, name, local=local), folder, repo, named, options)
        revisions.append(replace(revision, made=made))
    return revisions


def _checkpoint(
    run: Path, stage: str, layout: str, dtype: str | None, progress: Callable[[int, int], None] | None
) -> tuple[Path, Path | None]:
    """(folder of a stage's checkpoint, the same if it had to be made). One that was made is used again."""
    export = find_checkpoint(run, stage)
    config = read_json(export / "config.json")
    if layout == "native" and dtype is None and {"auto_map", "fingerprints"} <= set(config):
        return export, None
    state = hashlib.sha256((export.parent / "done.json").read_bytes() + __version__.encode()).hexdigest()[:12]
    folder = run / "publish" / "-".join([stage, layout, dtype or "stored", state])
    if not folder.is_dir():
        export_run(run, folder, stage=stage, layout=layout, dtype=dtype, progress=progress)
    return folder, folder


def _revision(facts: Facts, folder: Path, repo: str, tags: tuple[str, ...], options: CardOptions) -> Revision:
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    }
    plots = []
    for name, caption, content in draw_png(facts.record, PLOTS) if facts.record else []:
        files[f"report/{name}.png"] = content
        plots.append((f"report/{name}.png", caption))
    if facts.recipe:
        files["recipe.yaml"] = to_yaml(facts.recipe).encode()
    if "README.md" not in files:
        revision = tags[0] if tags else None
        files["README.md"] = write_card(facts, repo, options, plots, revision).encode()
    model = identity(facts)
    steps = {"stage": facts.stage, "step": facts.step, "source_tokens": facts.tokens}
    record = {"schema": SCHEMA, "lclm": __version__, "model": model, **steps, "files": sorted(files)}
    files[RECORD] = (json.dumps(record, indent=1) + "\n").encode()
    title = f"{facts.recipe.get('name') or folder.name}, stage {facts.stage}" if facts.stage else folder.name
    return Revision(f"lclm: {title}", files, tags, model)


def identity(facts: Facts) -> dict[str, Any]:
    """What is the same for all revisions of a model, and differs for another one."""
    config = facts.config
    parts = {
        part: [getattr(inner, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers")]
        for part in ("encoder", "decoder")
        if (inner := getattr(config, f"{part}_config"))
    }
    settings = [config.ratios, config.window, config.pooling, config.encoder_attention, config.adapter]
    recipe = facts.record.recipe if facts.record else {}
    run = [recipe.get(key) for key in ("name", "seed", "model")] if recipe else None
    return {"architecture": _digest([parts, settings]), "run": run and _digest(run)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe(revisions: list[Revision], remote: Remote, *, private: bool, collection: str | None) -> str:
    """What `publish` would do, file by file, with the cards."""
    parts = [f"to {remote.api.endpoint}/{remote.name}" + (" (private)" if private else "")]
    for revision in revisions:
        tags = f"; tags {', '.join(revision.tags)}" if revision.tags else ""
        parts.append(f"\n{revision.title}: {len(revision.files)} files, {revision.bytes:,} bytes{tags}")
        parts += [f"  {_size(content):>16,}  {path}" for path, content in sorted(revision.files.items())]
    if collection:
        parts.append(f"\nin the collection {collection!r} of {remote.name.split('/')[0]}")
    for revision in revisions:
        parts.append(f"\nREADME.md of {revision.title}:\n\n{revision.card}")
    return "\n".join(parts)


def publish(
    revisions: list[Revision],
    remote: Remote,
    *,
    private: bool = False,
    collection: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload what `prepare` returned; returns the repository's address. Called again, it goes on.

    private: a new repository is private. collection: title of the owner's collection to add it to.
    overwrite: go on where the repository holds another model or a tag names another checkpoint, and move the
    tag. Raises ValueError otherwise, before anything is sent.
    """
    remote.log_in()
    found = remote.find()
    removed = _may_go_on(revisions[-1], remote, found, private=private, overwrite=overwrite)
    tagged = _tagged(revisions, remote, found, overwrite=overwrite)
    for revision in revisions:
        remote.check_card(revision.card)
    if found is None:
        remote.create(private=private)
    ours = {*removed, *(path for revision in revisions for path in revision.files)}
    for revision in revisions:
        if revision is not revisions[-1] and tagged.issuperset(revision.tags):
            say(f"{revision.title}: there already")
            continue
        say(f"{revision.title}: {len(revision.files)} files, {revision.bytes / 1e6:,.1f} MB")
        sha = remote.upload(revision.files, sorted(ours), revision.title)
        for tag in revision.tags:
            if tag not in tagged:
                remote.tag(tag, sha, move=overwrite)
    if collection:
        say(f"collection: {remote.collect(collection, private=private)}")
    for revision in revisions:
        if revision.made is not None:
            shutil.rmtree(revision.made, ignore_errors=True)
    return f"{remote.api.endpoint}/{remote.name}"


def _may_go_on(
    revision: Revision, remote: Remote, found: dict[str, Any] | None, *, private: bool, overwrite: bool
) -> list[str]:
    """Files there that an upload is to remove. ValueError when it may not write there."""
    if found is None:
        return []
    if private and not found["private"]:
        raise ValueError(
            f"{remote.name} exists and is public: --private makes new repositories only; change it in the "
            "settings of the repository, or leave --private out"
        )
    files = remote.files(found["sha"])
    if RECORD in files:
        record = _record(remote.read(RECORD, found["sha"]))
        theirs, ours = record["model"], revision.model
        other = [key for key in ours if ours[key] and theirs.get(key) and ours[key] != theirs[key]]
        if other and not overwrite:
            raise ValueError(
                f"{remote.name} holds another model (its {other[0]} differs); give another --repo, or "
                "--overwrite to replace it (older commits stay readable there)"
            )
        return list(record["files"])
    if any(path.endswith(WEIGHTS) for path in files):
        if not overwrite:
            raise ValueError(
                f"{remote.name} holds a model that lclm did not publish; give another --repo, or --overwrite "
                "to replace it (older commits stay readable there)"
            )
        return [path for path in files if not KEPT.fullmatch(path)]
    return []


def _record(content: bytes) -> dict[str, Any]:
    """What `publication.json` says; of one that says nothing, that it is of some other model."""
    try:
        record = json.loads(content)
        return {"model": dict(record["model"]), "files": [str(path) for path in record["files"]]}
    except (ValueError, KeyError, TypeError):
        return {"model": {"architecture": "not known"}, "files": []}


def _tagged(
    revisions: list[Revision], remote: Remote, found: dict[str, Any] | None, *, overwrite: bool
) -> set[str]:
    """The tags that name their revision's checkpoint already. ValueError when one names another checkpoint
    and may not be moved."""
    right = set()
    there = found["tags"] if found else {}
    for revision in revisions:
        for tag in revision.tags:
            if tag not in there:
                continue
            if _equal(revision.checkpoint, remote.files(there[tag])):
                right.add(tag)
            elif not overwrite:
                raise ValueError(
                    f"{remote.name}: tag {tag} names another checkpoint; give another --tag or --repo, or "
                    "--overwrite to move it (its commit stays readable there)"
                )
    return right


def _equal(files: dict[str, Path | bytes], there: dict[str, str]) -> bool:
    """Whether a revision on the Hub holds exactly these checkpoint files."""
    theirs = {
        path: oid for path, oid in there.items() if not path.startswith(BESIDE) and not KEPT.fullmatch(path)
    }
    if set(theirs) != set(files):
        return False
    return all(content_id(content, theirs[path]) == theirs[path] for path, content in files.items())


def content_id(content: Path | bytes, like: str) -> str:
    """The id that the Hub gives to a file: SHA-256 if `like` is one, else git's SHA-1."""
    if len(like) == 64:
        return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
