"""Workers of a fork server are as those that are started afresh, whatever has changed since it was started."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# A map that has chosen the fork server by itself, as it does beside threads, and what its workers say.
PROGRAM = """
    import importlib, multiprocessing, os, sys, threading, time
    from pathlib import Path
    import tools
    from opero import opmap
    from opero.concurrency import fork_server

    def pid_of_the_server():
        return fork_server.known()["_forkserver_pid"]

    if __name__ == "__main__":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        tell = opmap(workers=1, retries=0, progress=False)(tools.tell)
"""


def program(folder, main, *, cwd=None):
    """What a program says that has this at its end."""
    (folder / "tools.py").write_text("import os\ndef tell(name): return os.environ.get(name, 'first')\n")
    path = folder / "script.py"
    path.write_text(textwrap.dedent(PROGRAM) + textwrap.indent(textwrap.dedent(main), "    "))
    command = [sys.executable, "-W", "error", path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd or folder)
    assert run.stderr == ""
    return run.stdout.split()


def test_a_variable_of_the_environment_that_was_set_since_is_known(tmp_path):
    main = """
        print(*tell(["KEY"]))
        os.environ["KEY"] = "second"
        print(*tell(["KEY"]))
        del os.environ["KEY"]
        print(*tell(["KEY"]))
    """
    assert program(tmp_path, main) == ["first", "second", "first"]


def test_a_module_that_was_changed_and_loaded_again_since_is_the_new_one(tmp_path):
    main = """
        print(*tell(["KEY"]))
        Path("tools.py").write_text("def tell(name): return 'changed'")
        importlib.invalidate_caches()
        importlib.reload(tools)
        print(*opmap(workers=1, retries=0, progress=False)(tools.tell)(["KEY"]))
    """
    assert program(tmp_path, main) == ["first", "changed"]


def test_one_server_serves_as_long_as_nothing_changes(tmp_path):
    main = """
        servers = {tell([str(number)]) and pid_of_the_server() for number in range(3)}
        os.environ["PYTEST_CURRENT_TEST"] = "the next one"
        print(len(servers | {tell(["KEY"]) and pid_of_the_server()}), None in servers)
    """
    assert program(tmp_path, main) == ["1", "False"]


def test_a_module_is_that_of_the_program_and_not_one_of_the_current_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tools.py").write_text("raise SystemExit('a stranger')")
    assert program(tmp_path, 'print(*tell(["KEY"]))', cwd=tmp_path / "data") == ["first"]


def test_nothing_of_the_current_folder_is_imported_in_place_of_an_installed_package(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tqdm.py").write_text("open('was_run', 'w')")
    (tmp_path / "data" / "opero.py").write_text("open('was_run', 'w')")
    main = """
        import tqdm
        print(*tell(["KEY"]), os.listdir())
    """
    assert program(tmp_path, main, cwd=tmp_path / "data")[0] == "first"
    assert not (tmp_path / "data" / "was_run").exists()


def test_workers_are_told_nothing_that_is_meant_for_the_server(tmp_path):
    main = """
        print(*tell(["OPERO_PRELOADS", "PYTHONSAFEPATH"]), "OPERO_PRELOADS" in os.environ)
        os.environ["PYTHONSAFEPATH"] = "own"
        print(*tell(["PYTHONSAFEPATH"]), os.environ["PYTHONSAFEPATH"])
    """
    assert program(tmp_path, main) == ["first", "first", "False", "own", "own"]


@pytest.mark.parametrize("whose", ["opero", "the program"])
def test_a_server_whose_processes_live_is_left_to_them(tmp_path, whose):
    main = {
        "opero": """
            with tell.pool():
                print(*tell(["KEY"]))
                os.environ["KEY"], server = "second", pid_of_the_server()
                print(*opmap(workers=1, retries=0, progress=False)(tools.tell)(["KEY"]), *tell(["KEY"]))
                print(pid_of_the_server() == server)
        """,
        "the program": """
            print(*tell(["KEY"]))
            process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(3,))
            process.start()
            os.environ["KEY"], server = "second", pid_of_the_server()
            print(*tell(["KEY"]), process.is_alive())
            process.join()
            print(process.exitcode, pid_of_the_server() == server)
        """,
    }
    said = {"opero": ["first", "second", "first", "True"], "the program": ["first", "second", "True", "0", "True"]}
    assert program(tmp_path, main[whose]) == said[whose]


def test_what_a_program_has_chosen_for_its_server_is_kept(tmp_path):
    main = """
        multiprocessing.set_forkserver_preload(["tools"])
        print(*tell(["KEY"]), fork_server.known()["_preload_modules"])
    """
    assert program(tmp_path, main) == ["first", "['tools']"]
