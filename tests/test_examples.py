"""The examples end well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_map_that_is_killed_half_way_goes_on():
    ended = subprocess.run([sys.executable, EXAMPLES / "resume.py"], check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "of them from the cache" in ended.stdout
