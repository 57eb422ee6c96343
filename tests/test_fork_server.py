"""Workers of a fork server are as those that are started afresh, whatever has changed since it was started."""

from __future__ import annotations

import os
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
        return vars(fork_server._latest[0])["_forkserver_pid"]

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


def test_where_its_socket_has_no_place_workers_are_started_without_one(tmp_path, monkeypatch):
    # A path of a socket has at most 108 characters.
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    main = """
        print(*tell(["KEY"]), len(fork_server._latest))
    """
    # Python 3.14 looks for a shorter path itself.
    assert program(tmp_path, main) == ["first", "1" if sys.version_info >= (3, 14) else "0"]


def test_paths_among_the_folders_of_modules_are_passed_over_as_an_import_does(tmp_path):
    main = """
        sys.path.insert(0, Path("plugins"))
        print(*tell(["KEY"]), sys.path[0])
    """
    assert program(tmp_path, main) == ["first", "plugins"]


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
def test_a_server_that_was_replaced_goes_on_for_its_processes(tmp_path, whose):
    main = {
        "opero": """
            with tell.pool():
                print(*tell(["KEY"]))
                os.environ["KEY"] = "second"
                os.utime("tools.py", (0, 1))
                print(*opmap(workers=1, retries=0, progress=False)(tools.tell)(["KEY"]), *tell(["KEY"]))
        """,
        "the program": """
            print(*tell(["KEY"]))
            process = multiprocessing.get_context("forkserver").Process(target=sys.exit, args=(3,))
            process.start()
            for value in ("second", "third"):
                os.environ["KEY"] = value
                print(*tell(["KEY"]))
            process.join()
            print(process.exitcode)
        """,
    }
    said = {"opero": ["first", "second", "first"], "the program": ["first", "second", "third", "3"]}
    assert program(tmp_path, main[whose]) == said[whose]


def test_replaced_servers_end(tmp_path):
    main = """
        servers, deadline = [], time.monotonic() + 30
        while len(servers) < 4 or Path(f"/proc/{servers[0]}").exists():
            assert time.monotonic() < deadline, servers
            os.utime("tools.py", (0, len(servers)))
            tell(["KEY"])
            servers.append(pid_of_the_server())
        print(len(servers) == len(set(servers)))
    """
    assert program(tmp_path, main) == ["True"]


def test_programs_start_processes_of_their_own_while_servers_are_replaced(tmp_path):
    main = """
        def start_own():
            for number in range(10):
                here, there = multiprocessing.Pipe(duplex=False)
                # Held until all is over: an exit code may be read by two threads at once, of which one finds none.
                processes.append(multiprocessing.get_context("forkserver").Process(target=there.send, args=(number,)))
                processes[-1].start()
                heard.append(here.recv())

        processes, heard, said = [], [], []
        tell(["KEY"])
        thread = threading.Thread(target=start_own)
        thread.start()
        for number in range(8):
            os.environ["KEY"] = str(number)
            os.utime("tools.py", (0, number))
            said += tell(["KEY"])
        thread.join()
        print(said == [str(number) for number in range(8)], heard == list(range(10)))
    """
    assert program(tmp_path, main) == ["True", "True"]


def test_a_forked_child_has_a_server_of_its_own(tmp_path):
    main = """
        print(*tell(["KEY"]), flush=True)
        if os.fork() == 0:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            os.environ["KEY"] = "child"
            print(*tell(["KEY"]), flush=True)
            os._exit(0)
        os.wait()
        print(*tell(["KEY"]))
    """
    assert program(tmp_path, main) == ["first", "child", "first"]


def test_whatever_stands_among_the_modules_is_no_matter(tmp_path):
    main = """
        class Lazy:
            def __getattr__(self, name):
                raise ImportError(name)

        class Anything:
            def __getattr__(self, name):
                return self

        sys.modules |= {"lazy": Lazy(), "anything": Anything()}
        print(*tell(["KEY"]))
    """
    assert program(tmp_path, main) == ["first"]


def test_opero_may_be_where_only_the_program_knows(tmp_path):
    """The folders of modules that workers have are those of the program at each time, too."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "latecomer.py").write_text("def tell(name): return 'late'\n")
    (tmp_path / "tools.py").write_text("import os\ndef tell(name): return os.environ.get(name, 'first')\n")
    known = [path for path in sys.path if path and not path.startswith((sys.base_prefix, str(tmp_path)))]
    main = """
        names = ["OPERO_PRELOADS", "PYTHONSAFEPATH", "PYTHONPATH"]
        print(*tell(names))
        with multiprocessing.get_context("forkserver").Pool(1) as own:
            print(*own.map(tools.tell, names))
        sys.path.append("late")
        import latecomer
        print(*opmap(workers=1, retries=0, progress=False)(latecomer.tell)(["KEY"]))
    """
    source = f"import sys\nsys.path += {known!r}\n" + textwrap.dedent(PROGRAM)
    path = tmp_path / "script.py"
    path.write_text(source + textwrap.indent(textwrap.dedent(main), "    "))
    environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    run = subprocess.run(
        [sys._base_executable, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=environ,
    )
    assert run.stderr == ""
    assert run.stdout.split() == ["first"] * 6 + ["late"]


def test_what_a_program_has_chosen_for_its_server_is_loaded_for_workers_too(tmp_path):
    (tmp_path / "heavy.py").write_text("import os\nloader = os.getpid()\n")
    main = """
        import heavy
        multiprocessing.set_forkserver_preload(["heavy"])
        loaded = opmap(workers=1, retries=0, progress=False)(lambda _: __import__("heavy").loader)([1])
        print(loaded == [pid_of_the_server()])
    """
    assert program(tmp_path, main) == ["True"]


def test_what_a_module_prints_while_it_is_imported_is_printed_by_the_server_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "loud.py").write_text("print('imported')\ndef tell(name): return name\n")
    main = """
        import loud
        multiprocessing.set_forkserver_preload(["loud"])
        for _ in range(2):
            opmap(workers=1, retries=0, progress=False)(loud.tell)(["KEY"])
    """
    assert program(tmp_path, main) == ["imported"] * 2
