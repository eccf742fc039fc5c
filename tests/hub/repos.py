"""What a Hub keeps: repositories of commits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's SHA-1 of another."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: commits by id, branches and tags."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], title: str, branch: str = "main") -> str:
        """Add a commit to a branch; returns its id."""
        listed = f"{title}{len(self.commits)}{sorted((path, blob.oid) for path, blob in files.items())}"
        sha = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[sha] = files
        self.titles.append(title)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or id."""
        known = self.branches | self.tags | {sha: sha for sha in self.commits}
        return known.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents at a revision."""
        sha = self.find(revision)
        assert sha is not None, revision
        return {path: blob.data for path, blob in self.commits[sha].items()}
