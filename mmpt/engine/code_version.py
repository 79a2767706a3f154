"""Which code a run is of."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 10.0


def code_version() -> str:
    """The commit of the checkout, "+changes" if tracked files differ; where there is none, the folder of the code."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return str(ROOT)  # installed, or a snapshot, somewhere below another checkout
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return str(ROOT)
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
    return done.stdout.strip()
