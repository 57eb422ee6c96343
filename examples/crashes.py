"""Map over files, in processes, with a library that crashes, hangs and leaks; nothing is lost but what it crashed on.

`convert` stands for somebody else's C code: one file ends its process, one never ends, one is at fault itself, and one
crashes the first time only. Each costs its own item, and all others have their results.

    python examples/crashes.py
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from opero import CallTimeoutError, WorkerCrashedError, opmap

FILES = 40


@opmap(
    mode="process",
    workers=2,
    attempt_timeout=1,  # a worker that takes longer is ended, and replaced
    retries=1,  # a crash is an attempt that failed
    min_delay=0.01,
    retry_on=WorkerCrashedError,
    return_exceptions=True,  # what failed is its exception in the list
    pool_options={"max_tasks_per_worker": 20},  # against leaks
    progress="files",
)
def convert(path: Path, folder: Path) -> int:
    """Count the words of a file, or fail as its name says."""
    match path.stem:
        case "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes-once" if not (folder / "seen").exists():
            (folder / "seen").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            time.sleep(3600)
        case "wrong":
            raise ValueError("this is no text")
    return len(path.read_text().split())


def main() -> int:
    """Make files, convert them, check; return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [*(f"{number:03}" for number in range(FILES)), "crashes", "crashes-once", "hangs", "wrong"]
        paths = [folder / f"{name}.txt" for name in names]
        for path in paths:
            path.write_text("three short words\n" * 10)

        results = convert(paths, folder=folder)

    print(f"{len(results.ok)} of {len(results)} files, {convert.stats.attempts} attempts; what failed:")
    for outcome in results.failed:
        print(f"  {outcome.item.name:18} {type(outcome.error).__name__}, attempts: {outcome.attempts}")
    failed = {outcome.item.stem: type(outcome.error) for outcome in results.failed}
    is_well = failed == {"crashes": WorkerCrashedError, "hangs": CallTimeoutError, "wrong": ValueError}
    is_well = is_well and results.ok == [30] * (FILES + 1)
    print("ok" if is_well else "FAILED")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
