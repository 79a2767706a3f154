"""The code of a run, kept with it: what was launched is what restarts, whatever happens to the checkout meanwhile."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmpt", "launcher", "data_tools")
GIT_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Snapshot:
    folder: Path
    """Holds the packages; goes first on PYTHONPATH."""
    git_sha: str
    """Of the checkout, with "+changes" where files differ from it; "" for an installed package."""

    @property
    def train(self) -> Path:
        return self.folder / "mmpt" / "train.py"


def take_snapshot(code: Path) -> Snapshot:
    """Copy the packages to `code`/DIGEST, unless that is there already. The copy appears by one rename."""
    files = package_files()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    folder = code / digest.hexdigest()[:12]
    if not folder.is_dir():
        code.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=code, prefix=".copy-") as copy:
            for path in files:
                target = Path(copy) / "of" / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            try:
                os.rename(Path(copy) / "of", folder)
            except OSError:
                if not folder.is_dir():  # another launch was faster
                    raise
    return Snapshot(folder, git_sha())


def package_files() -> list[Path]:
    """Every file of the packages but compiled ones and what editors leave."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    hidden = ("__pycache__",)
    return sorted(
        p for p in found if not any(part in hidden or part.startswith(".") for part in p.parts[len(ROOT.parts) :])
    )


def git_sha() -> str:
    """The commit of the checkout, "+changes" if tracked files differ; "" where there is no checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return ""  # a package installed somewhere below another checkout
        sha = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{sha}+changes" if changed else sha


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
    ).stdout.strip()
