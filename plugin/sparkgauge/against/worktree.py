"""A commit of the user's repository, checked out beside it for the length of a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sparkgauge.errors import ConfigurationError, GaugeError

GIT_TIMEOUT_SECONDS = 300.0
"""A checkout of a large repository takes a while; a dead network file system takes for ever."""

OPTION = "--gauge-against"


@dataclass(frozen=True)
class Reference:
    """A commit that exists in a repository."""

    name: str
    """As the user wrote it."""
    commit: str
    subject: str
    """First line of the commit's message."""
    root: Path
    """Top folder of the repository's working tree."""

    @property
    def short(self) -> str:
        """Return the commit's hash as people quote it."""
        return self.commit[:10]


def find_reference(name: str, folder: Path) -> Reference:
    """Return the commit ``name`` of the repository around ``folder``; ConfigurationError says why there is none."""
    root = _root(folder)
    hint = "Name a commit, branch or tag of this repository: git log --oneline."
    if name.startswith("-"):
        raise ConfigurationError(f"Bad value for {OPTION}", expected="a commit", actual=repr(name), hint=hint)
    found = _git(["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], root)
    if found.returncode:
        if _git(["rev-parse", "--is-shallow-repository"], root).stdout.strip() == "true":
            hint = "The clone is shallow: git fetch --unshallow (in CI: fetch-depth 0), or fetch that commit."
        raise ConfigurationError(
            "No such commit", expected=f"{OPTION} with a commit", actual=repr(name), where=str(root), hint=hint
        )
    commit = found.stdout.strip()
    subject = _git(["log", "-1", "--format=%s", commit], root).stdout.strip()
    return Reference(name, commit, subject, root)


class Checkout:
    """A temporary folder with the commit's files in ``tree`` and room for logs beside them; see :meth:`remove`."""

    def __init__(self, reference: Reference) -> None:
        """Check ``reference`` out; GaugeError quotes git, and leaves nothing, when that fails."""
        self.reference = reference
        self.folder = Path(tempfile.mkdtemp(prefix="sparkgauge-against-")).resolve()
        self.tree = self.folder / "checkout"
        # the user's post-checkout hook is meant for their own working tree
        command = ["-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(self.tree)]
        try:
            done = _git([*command, reference.commit], reference.root)
        except BaseException:
            self.remove()
            raise
        if done.returncode:
            self.remove()
            raise GaugeError(
                f"git cannot check {reference.name} out", actual=done.stderr.strip(), where=str(reference.root)
            )

    def remove(self) -> None:
        """Remove the folder and git's note of it; further calls do nothing."""
        remove_checkout(self.reference.root, self.folder)


def remove_checkout(root: Path, folder: Path) -> None:
    """Remove what a :class:`Checkout` of the repository at ``root`` has made in ``folder``, complete or not."""
    if not folder.exists():
        return
    _git(["worktree", "remove", "--force", str(folder / "checkout")], root)
    shutil.rmtree(folder, ignore_errors=True)
    _git(["worktree", "prune"], root)


def _root(folder: Path) -> Path:
    found = _git(["rev-parse", "--show-toplevel"], folder)
    if found.returncode or not found.stdout.strip():
        raise ConfigurationError(
            f"{OPTION} needs a git repository",
            expected="the tests' folder inside a working tree",
            actual=(found.stderr.strip().splitlines() or ["a repository without a working tree"])[0],
            where=str(folder),
            hint="This is pytest's root folder; an ini file in the repository, or --rootdir, names another.",
        )
    return Path(found.stdout.rstrip("\n")).resolve()


def _git(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # Inside a git hook these name another index or folder than the one asked about.
    foreign = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        raise ConfigurationError(f"{OPTION} needs git", expected="git on the PATH", actual="none") from None
    except subprocess.TimeoutExpired:
        raise GaugeError("git does not answer", actual=f"git {' '.join(arguments)}", where=str(folder)) from None
