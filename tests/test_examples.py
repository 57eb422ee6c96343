"""The examples end well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_enough_to_be_read_and_listed(example):
    readme = (EXAMPLES / "README.md").read_text()

    assert f"]({example.name})" in readme
    assert len(example.read_text().splitlines()) < 120


@pytest.mark.parametrize("world", [[], ["--async"]], ids=["threads", "tasks"])
def test_files_come_whole_from_mirrors_that_misbehave(world):
    command = [sys.executable, EXAMPLES / "mirrors.py", "--files", "60", *world]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "ok: every body matches its file" in ended.stdout


def test_a_library_that_crashes_and_hangs_costs_the_items_that_it_does_so_on():
    ended = subprocess.run([sys.executable, EXAMPLES / "crashes.py"], check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "41 of 44 files" in ended.stdout


def test_a_client_class_passes_its_own_tests():
    ended = subprocess.run([sys.executable, EXAMPLES / "client.py"], check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("ok: ") == 3


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

    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "ok" in ended.stdout.splitlines()
