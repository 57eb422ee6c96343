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


def test_a_batch_of_prompts_ends_well_with_two_keys_of_three_that_are_of_no_use():
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "llm_batch.py", "--prompts", "150"], check=False, capture_output=True, text=True
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "150 of 150 from the cache" in ended.stdout


def test_a_batch_of_prompts_keeps_to_its_budget():
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "llm_batch.py", "--prompts", "100", "--budget", "3000"],
        check=False,
        capture_output=True,
        text=True,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "AllFailedError" in ended.stdout


def test_the_web_service_answers_refuses_and_ends_well():
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "web_service.py", "--check"], check=False, capture_output=True, text=True
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "ok" in ended.stdout.splitlines()
