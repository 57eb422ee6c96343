"""A long map over files that is killed half way, and goes on where it stopped.

``python examples/resume.py`` makes some hundred files, maps over them in another process, kills that process with
SIGKILL half way, starts it again, and checks that no file whose result was there ran twice. ``--work FOLDER`` is what
the other process does; run it by hand, interrupt it as you like, and run it again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from opero import opmap

FILES = 400
SECONDS_PER_FILE = 0.01
WORKERS = 4


def map_files(folder: Path) -> None:
    """Digest each file of ``folder``, slowly; print the name of each that is done."""

    @opmap(
        mode="thread",
        workers=WORKERS,
        progress=False,
        cache=True,
        cache_backend="disk",
        cache_namespace="resume-example",
        cache_options={"cache_dir": folder / "cache"},
    )
    def digest(path: Path) -> str:
        with (folder / "runs.log").open("a") as log:
            log.write(f"{path.name}\n")
        time.sleep(SECONDS_PER_FILE)  # a slow, paid call stands here
        return hashlib.sha256(path.read_bytes()).hexdigest()

    paths = sorted((folder / "files").iterdir())
    for outcome in digest.stream(paths):
        print(f"{outcome.item.name} {outcome.result} {'cached' if outcome.cached else 'new'}", flush=True)


def demonstrate(folder: Path) -> int:
    """Start, kill, start again; the exit code is 1 if anything was lost or done twice."""
    (folder / "files").mkdir()
    for number in range(FILES):
        (folder / "files" / f"{number:04}.txt").write_text(f"file {number}\n" * 50)

    first = lines_until(folder, FILES // 2)
    print(f"killed after {len(first)} of {FILES} files")
    second = lines_until(folder, None)
    cached = sum(line.endswith(" cached") for line in second)
    print(f"again: {len(second)} files, {cached} of them from the cache")

    runs = Counter((folder / "runs.log").read_text().split())
    twice = {name for name, count in runs.items() if count > 1}
    lost_work = twice & {line.split()[0] for line in first}
    print(f"ran: {sum(runs.values())} times; those that were under way when it was killed ran again: {len(twice)}")
    return int(bool(lost_work) or len(second) != FILES or len(twice) > WORKERS)


def lines_until(folder: Path, stop_after: int | None) -> list[str]:
    """What a process that maps the files prints; killed after so many lines."""
    command = [sys.executable, __file__, "--work", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        for line in process.stdout or ():
            lines.append(line.strip())
            if len(lines) == stop_after:
                os.kill(process.pid, signal.SIGKILL)
                break
    return lines


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="map over FOLDER/files with a cache in FOLDER")
    arguments = parser.parse_args()
    if arguments.work is not None:
        map_files(arguments.work)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return demonstrate(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
