"""A repository on the Hub: asked patiently, with errors in plain words that hold no secret."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, parse_ratelimit_headers, validate_repo_id

T = TypeVar("T")
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may well succeed."""
TRIES = 6
LONGEST_PAUSE = 300.0
LARGE = 8 << 20
"""Bytes from which a file is sent, and its arrival confirmed, before the next."""
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
"""What hf_xet, whose errors are ConnectionErrors, says of a server's answer."""
_SECRETS = (
    (re.compile(r"\bhf_\w{8,}"), "hf_***"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20)[^\s\"',;]+"), r"\1 ***"),
    (re.compile(r"(\w://)[^/\s@]*@"), r"\1***@"),
    (re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>)]*"), r"\1?***"),
)


def scrub(text: str, token: str | None = None) -> str:
    """`text` without tokens, authorization headers, and the users and queries of addresses."""
    if token:
        text = text.replace(token, "***")
    for pattern, without in _SECRETS:
        text = pattern.sub(without, text)
    return text


class _Scrubbed(logging.Filter):
    """Keeps secrets (signed addresses, above all) out of huggingface_hub's own messages."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage(), get_token()), ()
        return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, came with."""
    for inner in _chain(error):
        if isinstance(inner, HfHubHTTPError) and inner.response is not None:
            return int(inner.response.status_code)
        if said := _XET_STATUS.search(str(inner)):
            return int(said[1])
    return None


def lost(error: BaseException) -> bool:
    """Whether the connection, and not the server's answer, was at fault."""
    kinds = {cls.__name__ for inner in _chain(error) for cls in type(inner).__mro__}
    if "OfflineModeIsEnabled" in kinds or status_of(error) is not None:
        return False
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"})


def pause_after(error: BaseException, tried: int) -> float | None:
    """Seconds to wait before another try: what the server asks for, else doubling. None: it is no use."""
    status = status_of(error)
    if status is None:
        return min(2.0**tried, 32.0) if lost(error) else None
    if status not in AGAIN:
        return None
    for inner in _chain(error):
        if isinstance(inner, HfHubHTTPError) and inner.response is not None:
            limit = parse_ratelimit_headers(inner.response.headers)
            if status == 429 and limit is not None and limit.remaining == 0:
                return min(limit.reset_in_seconds + 1.0, LONGEST_PAUSE)
            asked = inner.response.headers.get("Retry-After", "").strip()
            if asked.isdigit():
                return min(float(asked), LONGEST_PAUSE)
    return min(2.0**tried, 32.0)


def patiently(act: Callable[[], T], say: Callable[[str], None] = lambda text: None) -> T:
    """What `act` returns. After failures that may pass (429, 5xx, lost connections) it is tried again."""
    for tried in range(TRIES - 1):
        try:
            return act()
        except Exception as error:
            pause = pause_after(error, tried)
            if pause is None:
                raise
            what = f"the Hub answered {status_of(error)}" if status_of(error) else "the connection was lost"
            say(f"{what}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return act()


class Remote:
    """The repository `name` ("org/name") of the Hub at HF_ENDPOINT. say: hears of retries.

    Every method raises ValueError with what is wrong and how to fix it.
    """

    def __init__(self, name: str, say: Callable[[str], None] = lambda text: None) -> None:
        self.name, self.say = check_name(name), say
        self.api = HfApi(library_name="lclm")
        self.user = ""
        for handler in logging.getLogger("huggingface_hub").handlers:
            if not any(isinstance(there, _Scrubbed) for there in handler.filters):
                handler.addFilter(_Scrubbed())

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Turn errors of the Hub and the network into a ValueError without secrets."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(self._words(error)) from None
        except Exception as error:
            if status_of(error) is None and not lost(error):
                raise
            raise ValueError(self._words(error)) from None

    def _words(self, error: BaseException) -> str:
        status = status_of(error)
        said = " ".join(scrub(str(error), get_token()).split())
        said = said if len(said) <= 600 else f"{said[:600]} …"
        where, who = f"{self.api.endpoint}/{self.name}", f" as {self.user}" if self.user else ""
        again = "what arrived is kept there: run the same command again to go on"
        if status == 404 and "xet-write-token" in said:
            return f"{where}: has no Xet storage ({said}); set HF_HUB_DISABLE_XET=1, which uploads by LFS"
        if status == 401:
            return f"{where}: not allowed{who}: the token is missing, wrong or expired ({said}); {LOG_IN}"
        if status == 403:
            return (
                f"{where}: no right to write there{who} ({said}); use a token with write access to "
                f"{self.name.split('/')[0]}, or another --repo"
            )
        if status == 404:
            return f"{where}: not found{who}: no such user or organisation, or none you may write to ({said})"
        if status in (409, 412):
            return f"{where}: somebody else changed it at the same time ({said}); run the same command again"
        if status in AGAIN:
            return f"{where}: the Hub still answers {status} after {TRIES} tries ({said}); {again}"
        if lost(error):
            return f"{where}: the connection was lost, and again {TRIES} times ({said}); {again}"
        return said

    def _ask(self, act: Callable[[], T]) -> T:
        with self._plainly():
            return patiently(act, self.say)

    def log_in(self) -> None:
        """Find out who the token is of."""
        with self._plainly():
            token = get_token()
        if not token:
            raise ValueError(f"there is no token for {self.api.endpoint}; {LOG_IN}")
        found = self._ask(lambda: self.api.whoami())
        self.user = str(found.get("name", ""))
        role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise ValueError(f"the token of {self.user} may only read; {LOG_IN}")

    def check_card(self, card: str) -> None:
        """Let the Hub look at a card's metadata."""
        try:
            self._ask(ModelCard(card).validate)
        except ValueError as error:
            raise ValueError(f"README.md: {error}") from None

    def find(self) -> dict[str, Any] | None:
        """{"sha", "private", "tags": {tag: sha}} of the repository; None when there is none."""
        with self._plainly():
            try:
                info = patiently(lambda: self.api.model_info(self.name), self.say)
            except HfHubHTTPError as error:
                if (
                    error.response is not None
                    and error.response.headers.get("X-Error-Code") == "RepoNotFound"
                ):
                    return None
                if status_of(error) == 404:
                    return None
                raise
        refs = self._ask(lambda: self.api.list_repo_refs(self.name))
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        return {"sha": info.sha, "private": bool(info.private), "tags": tags}

    def create(self, *, private: bool) -> None:
        """Make the repository; one that exists is fine."""
        self._ask(lambda: self.api.create_repo(self.name, private=private or None, exist_ok=True))

    def files(self, revision: str) -> dict[str, str]:
        """{path: id of its content} at a revision: SHA-256 of large files, git's SHA-1 of others."""
        listed = self._ask(
            lambda: list(self.api.list_repo_tree(self.name, recursive=True, revision=revision))
        )
        return {
            file.path: file.lfs.sha256 if file.lfs else file.blob_id
            for file in listed
            if isinstance(file, RepoFile)
        }

    def read(self, path: str, revision: str) -> bytes:
        """The content of a small file."""
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as cache:
            found = self._ask(
                lambda: self.api.hf_hub_download(self.name, path, revision=revision, cache_dir=cache)
            )
            return Path(found).read_bytes()

    def upload(self, files: dict[str, Any], gone: Iterable[str], title: str) -> str:
        """Put `files` ({path: local path or bytes}) there and remove `gone`, in one commit; returns its id.

        Large files go first, one by one: those that have arrived are not sent again by a later call. Until
        the commit, which comes last, readers see what was there before.
        """
        listed = [(path, c if isinstance(c, bytes) else str(c)) for path, c in sorted(files.items())]
        operations = [CommitOperationAdd(path, content) for path, content in listed]
        for operation in operations:
            if operation.upload_info.size >= LARGE:
                self._ask(lambda one=operation: self.api.preupload_lfs_files(self.name, [one]))  # type: ignore[misc]
        before = self._ask(lambda: self.api.model_info(self.name).sha)

        def commit() -> str:
            nonlocal before, operations
            head = self.api.model_info(self.name).sha
            if head != before:  # by this commit, whose answer was lost, or by somebody: look at all anew
                operations = [CommitOperationAdd(path, content) for path, content in listed]
                before = head
            there = {entry.path for entry in self.api.list_repo_tree(self.name, recursive=True)}
            removed = [CommitOperationDelete(path) for path in gone if path in there and path not in files]
            made = self.api.create_commit(
                self.name, [*operations, *removed], commit_message=title, parent_commit=head
            )
            return str(made.oid)

        return self._ask(commit)

    def tag(self, tag: str, sha: str, *, move: bool) -> None:
        """Name a commit. A tag that is elsewhere is moved if `move`."""

        def act() -> None:
            there = {found.name: found.target_commit for found in self.api.list_repo_refs(self.name).tags}
            if there.get(tag) == sha:
                return
            if tag in there and move:
                self.api.delete_tag(self.name, tag=tag)
            self.api.create_tag(self.name, tag=tag, revision=sha)

        self._ask(act)

    def collect(self, title: str, *, private: bool) -> str:
        """Add the repository to its owner's collection of that title, made if need be; returns its URL."""
        owner = self.name.split("/")[0]
        found = self._ask(
            lambda: self.api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        )
        self._ask(lambda: self.api.add_collection_item(found.slug, self.name, "model", exists_ok=True))
        return str(found.url)


LOG_IN = "give one with write access in HF_TOKEN, or run `hf auth login`"


def check_name(name: str) -> str:
    """A repository's name with its owner. ValueError when it is none."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--repo {name}: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"--repo {name}: give the owner too, as in my-organisation/{name}")
    return name
