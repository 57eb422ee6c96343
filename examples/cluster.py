"""A batch for a flaky, rate-limited service on a cluster: ray's or dask's, here of two workers on this machine.

``python examples/cluster.py ray`` and ``python examples/cluster.py dask`` start one, map over 300 requests of which
some fail and one kills its worker, and check that nothing was lost and who was charged. With ``--address HOST:PORT``
the workers are those of a real cluster, which needs opero too; docs/clusters.md tells how to come by one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero import WorkerCrashedError, opmap

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS = 300
DEADLY = 123
RATE = 100


def ask(number: int, mirror: str) -> str:
    """Ask a mirror; the first one fails often, and one request is more than any worker can bear."""
    time.sleep(0.01)
    if number == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    if mirror == "a.example" and random.random() < 0.3:
        msg = f"{mirror} is busy"
        raise ConnectionError(msg)
    return f"{number} from {mirror}"


@contextlib.contextmanager
def local_cluster(engine: str) -> Iterator[dict[str, Any]]:
    """Two workers on this machine; gives the options of a pool that uses them."""
    if engine == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
        try:
            yield {}
        finally:
            ray.shutdown()
    else:
        import distributed

        here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **here) as cluster:
            yield {"address": cluster.scheduler_address}


def run(engine: str, pool_options: dict[str, Any], cache: Path) -> int:
    """Map twice over all requests: the second time all answers are in the cache; the exit code."""
    asked = opmap(
        mode=engine,
        pool_options=pool_options,
        progress=f"asking on {engine}",
        return_exceptions=True,
        retries=1,
        arg_fallback="mirror",
        rate_limit=RATE,
        cache=True,
        cache_backend="disk",
        cache_options={"cache_dir": cache},
    )(ask)
    began = time.monotonic()
    results = asked(range(REQUESTS), mirror=["a.example", "b.example"])
    print(f"{len(results.ok)} answers in {time.monotonic() - began:.1f} s; {asked.stats.retries} retries")

    (failed,) = results.failed
    errors = getattr(failed.error, "errors", [failed.error])
    crashes = sum(isinstance(error, WorkerCrashedError) for error in errors)
    print(f"request {failed.index} failed: {crashes} workers ended with it")

    hits = asked.stats.hits
    asked([number for number in range(REQUESTS) if number != DEADLY], mirror=["a.example", "b.example"])
    print(f"again: {asked.stats.hits - hits} answers from the cache")
    complete = len(results.ok) == REQUESTS - 1 and failed.index == DEADLY and crashes == len(errors)
    return 0 if complete and asked.stats.hits - hits == REQUESTS - 1 else 1


def main() -> int:
    """Run the example on the engine that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("ray", "dask"))
    parser.add_argument("--address", help="of a cluster that is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.address:
            return run(arguments.engine, {"address": arguments.address}, Path(folder))
        with local_cluster(arguments.engine) as pool_options:
            return run(arguments.engine, pool_options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
