"""Change the code in one place at a time, and see whether the fast tests notice: make mutants.

mutmut makes the mutants of the modules that pyproject.toml names; a random sample of them is tested. The
last lines are its score and the mutants that survived; `mutmut show NAME` in mutants/ prints one. MUTANTS=0
tests all.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mutants"
KILLED = {1, 3, 24, 36, -24, 152, 255}
"""Exit codes of mutmut's workers: a test failed, or the mutant ran far too long."""


def mutmut(*names: str) -> None:
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=FOLDER, check=True, env=environment, stdin=subprocess.DEVNULL)


def results() -> dict[str, int | None]:
    """The exit code of each mutant by its name; None: not tested."""
    found: dict[str, int | None] = {}
    for path in sorted(FOLDER.glob("mutants/**/*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for target in ("workflow/arena_distill", "tests", "config", "pyproject.toml"):
        link = FOLDER / Path(target).name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / target)
    mutmut("*heads.x_verdicts__mutmut_1")  # makes all mutants, tests one
    names = sorted(results())
    count = int(os.environ.get("MUTANTS", "150")) or len(names)
    chosen = random.Random(int(os.environ.get("MUTANTS_SEED", "0"))).sample(names, count)
    mutmut(*chosen)
    codes = results()
    survived = [name for name in chosen if codes[name] not in KILLED]
    print(f"{count - len(survived)} of {count} mutants killed, of {len(names)}; survived:")
    print("\n".join(f"  {name} ({codes[name]})" for name in sorted(survived)))


if __name__ == "__main__":
    main()
