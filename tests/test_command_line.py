"""`python -m opero`: what it tells, what it leaves alone, and what it clears."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import platform
import re
import runpy
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from importlib.metadata import version

import pytest

import opero
import opero.__main__ as opero_main
from opero import opero as resilient
from opero.core.stores.lasting import slug

LAMBDA_LIKE = "app.<locals>.<lambda>#0123456789abcdef"
LONG = "a.namespace." + 10 * "that.is.longer.than.the.name.of.its.folder."


@pytest.fixture
def home(tmp_path):
    """Where a user's cache folder would be."""
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def command(home, monkeypatch):
    """Run the command, as `python -m opero` does, in this process."""

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name, value in _at_home(home).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["opero", *arguments])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(opero_main.__file__, run_name="__main__")
        return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())

    return run


def _at_home(home):
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / "caches"), "USERPROFILE": str(home)}


@pytest.fixture
def folder(tmp_path):
    """That of a disk cache named by ``cache_dir``."""
    return tmp_path / "cache" / "opero"


@pytest.fixture
def fill(folder):
    """Put results into a namespace, as a program does that ends afterwards."""

    def filled(namespace, *values, **options):
        function = resilient(
            retries=0,
            cache=True,
            cache_backend="disk",
            cache_namespace=namespace,
            cache_options={"cache_dir": folder.parent},
            **options,
        )(lambda value: value)
        for value in values:
            function(value)
        function.__opero__.plan.cache.store.close()
        return function

    return filled


@pytest.fixture
def listed(command, folder):
    """What the command tells of each namespace: entries and bytes, by name."""

    def listing(code=0):
        ended = command("--cache-dir", str(folder.parent))
        assert (ended.returncode, ended.stderr) == (code, "")
        rows = re.findall(r"^ +(\d+|\?)  +(\d+)  (.*)$", ended.stdout, re.MULTILINE)
        return {name: (entries, int(size)) for entries, size, name in rows}

    return listing


def snapshot(folder):
    """All that a look may not change."""
    return {
        path: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


# What it tells


def test_it_tells_the_versions_and_the_python(command):
    told = command().stdout
    assert told.startswith(f"opero {opero.__version__}, Python {platform.python_version()} ({sys.executable})\n")


def test_it_tells_the_versions_of_what_is_installed(command):
    told = command().stdout
    for package in ("redis", "tqdm", "numpy", "pandas", "twat-cache"):
        assert re.search(rf"^{package} +{re.escape(version(package))}$", told, re.MULTILINE)


def test_it_tells_what_is_not_installed(command):
    assert re.search(r"^ray +not installed$", command().stdout, re.MULTILINE)


def test_it_imports_nothing_only_to_tell_of_it():
    # Not in the list: numpy and dill, which twat-cache imports, and that says where the cache lives.
    source = (
        "import sys, opero.__main__\n"
        "opero.__main__.main([])\n"
        "heavy = {'redis', 'tqdm', 'pandas', 'distributed', 'ray', 'httpx', 'requests', 'aiohttp', 'twat_mp'}\n"
        "found = heavy & sys.modules.keys()\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", source], check=True, capture_output=True)


def test_it_tells_where_the_disk_cache_lives(command, home):
    ended = command()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"Disk cache: {home / 'caches' / 'twat_cache' / 'opero'}\nempty\n" in ended.stdout


def test_another_folder_can_be_named(command, tmp_path):
    told = command("--cache-dir", str(tmp_path / "mine"), "--folder-name", "pages").stdout
    assert f"Disk cache: {tmp_path / 'mine' / 'pages'}\nempty\n" in told


def test_it_lists_namespaces_with_entries_and_bytes(fill, listed, folder):
    fill("app.price", 1, 2, 3)
    fill("app.stock", "x")
    sizes = {
        name: sum(path.stat().st_size for path in (folder / slug(name)).rglob("*"))
        for name in ("app.price", "app.stock")
    }
    assert listed() == {"app.price": ("3", sizes["app.price"]), "app.stock": ("1", sizes["app.stock"])}


def test_a_namespace_is_told_by_its_whole_name(fill, listed):
    names = ["app.price", LAMBDA_LIKE, LONG, "naïve/../.. ☃", " ", "a-b-c-"]
    for namespace in names:
        fill(namespace, 1)
    assert list(listed()) == sorted(names)


def test_a_name_that_is_no_text_for_a_terminal_is_told_as_python_would_write_it(fill, listed):
    names = ["\x1b[31mred", "two\nlines", "half a pair \ud800"]
    for namespace in names:
        fill(namespace, 1)
    assert sorted(listed()) == sorted(map(ascii, names))


def test_names_are_told_on_a_terminal_without_their_letters(fill, home, folder):
    fill("naïve", 1)
    command = [sys.executable, "-W", "error", "-m", "opero", "--cache-dir", str(folder.parent)]
    environment = {**os.environ, **_at_home(home), "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "na\\xefve" in told


def test_expired_and_deleted_entries_do_not_count(fill, listed):
    fill("short", 1, cache_ttl=1e-6)
    function = fill("deleted", 1, 2)
    function.cache_delete(1)
    function.__opero__.plan.cache.store.close()
    assert [entries for entries, _ in listed().values()] == ["1", "0"]


# What it leaves alone


def test_a_look_makes_nothing(command, home):
    command()
    assert list(home.iterdir()) == []


def test_a_look_changes_nothing(fill, listed, folder):
    fill("app.price", 1, b"x" * 2**21)
    (folder / "stray file").write_text("x")
    (folder / "stray folder").mkdir(mode=0o700)
    before = snapshot(folder.parent)
    assert list(listed()) == ["app.price"]
    assert snapshot(folder.parent) == before


USE_THE_CACHE = """
DEF f(x):
    return x
function = cached(f)
for number in range(int(told())):
    run(function, number)
say("used")
told()
"""


def test_what_a_running_program_has_just_stored_is_told(start, disk_backend, command):
    program = start(USE_THE_CACHE, {**disk_backend.options, "cache_namespace": "live"})
    program.tell("7")
    assert program.heard() == "used"
    assert re.search(r"^ +7 .* live$", command("--cache-dir", str(disk_backend.folder)).stdout, re.MULTILINE)
    program.tell("end")
    program.end()


def test_what_a_killed_program_has_left_is_told_and_left(start, disk_backend, command):
    program = start(USE_THE_CACHE, {**disk_backend.options, "cache_namespace": "killed"})
    program.tell("7")
    assert program.heard() == "used"
    os.kill(program.pid, signal.SIGKILL)
    program.kill()

    def lasting():
        # The index to the log belongs to whoever reads.
        return {path: content for path, content in snapshot(disk_backend.folder).items() if path.suffix != ".db-shm"}

    before = lasting()
    assert re.search(r"^ +7 .* killed$", command("--cache-dir", str(disk_backend.folder)).stdout, re.MULTILINE)
    assert lasting() == before


def test_nothing_is_unpickled(fill, listed, folder, tmp_path):
    fill("app.price", 1)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with contextlib.closing(sqlite3.connect(folder / slug("app.price") / "cache.db")) as connection, connection:
        bomb = pickle.dumps(Trap())
        connection.execute("UPDATE Cache SET key = ?, value = ?", (bomb, bomb))
        connection.execute("UPDATE Settings SET namespace = ?", (bomb,))
    assert [entries for entries, _ in listed(code=1).values()] == ["?"]
    assert not (tmp_path / "sprung").exists()


def test_a_link_is_not_followed(fill, listed, folder, tmp_path):
    fill("elsewhere", *range(5))
    (folder / slug("elsewhere")).rename(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    fill("app.price", 1)
    (folder / slug("app.price") / "big").symlink_to("/dev/zero")
    size = sum(path.stat().st_size for path in (folder / slug("app.price")).rglob("*"))
    rows = listed(code=1)
    assert rows["app.price"] == ("1", size)
    (told,) = [(name, numbers) for name, numbers in rows.items() if name.startswith("link")]
    assert "is not a folder" in told[0]
    assert told[1] == ("?", 0)


def test_a_damaged_database_costs_its_own_line_only(fill, listed, folder):
    fill("app.price", 1)
    fill("app.stock", 1)
    (folder / slug("app.stock") / "cache.db").write_bytes(b"no database" * 100)
    rows = listed(code=1)
    assert rows["app.price"][0] == "1"
    assert [numbers[0] for name, numbers in rows.items() if "cannot be read" in name] == ["?"]


def test_what_another_version_of_opero_has_left_is_told_and_is_no_fault(fill, listed, folder):
    fill("app.load", 1, 2)
    fill("app.store", 1)
    with contextlib.closing(sqlite3.connect(folder / slug("app.load") / "cache.db")) as database:
        database.executescript("DROP TABLE Settings; PRAGMA application_id = 1")
    entries = {name: numbers[0] for name, numbers in listed().items()}
    assert entries == {f"{slug('app.load')}: made by another version of opero": "0", "app.store": "1"}


def test_a_folder_that_others_can_write_to_is_refused(fill, command, folder):
    fill("app.price", 1)
    folder.chmod(0o777)
    for arguments in ([], ["--clear", "app.price"]):
        ended = command("--cache-dir", str(folder.parent), *arguments)
        assert ended.returncode == 1
        assert "can be written to by others" in ended.stderr
        assert "Traceback" not in ended.stderr
    folder.chmod(0o700)
    assert fill("app.price").cache_info().currsize == 1


def test_a_namespace_that_others_can_write_to_is_refused(fill, command, listed, folder):
    fill("app.price", 1)
    fill("app.stock", 1)
    (folder / slug("app.stock")).chmod(0o777)
    rows = listed(code=1)
    assert rows["app.price"][0] == "1"
    assert [numbers for name, numbers in rows.items() if "can be written to by others" in name] == [("?", 0)]
    assert command("--cache-dir", str(folder.parent), "--clear", "app.stock").returncode == 1
    assert stat.S_IMODE((folder / slug("app.stock")).stat().st_mode) == 0o777


# What it clears


def test_clear_empties_one_namespace_and_no_other(fill, command, listed, folder):
    fill("app.price", 1, 2, 3)
    fill("app.price.old", 1)
    ended = command("--cache-dir", str(folder.parent), "--clear", "app.price")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "cleared app.price\n"
    assert {name: entries for name, (entries, _) in listed().items()} == {"app.price": "0", "app.price.old": "1"}


@pytest.mark.parametrize("namespace", [LAMBDA_LIKE, LONG])
def test_clear_knows_a_namespace_whose_folder_does_not_tell_its_name(fill, command, folder, namespace):
    fill(namespace, 1)
    assert command("--cache-dir", str(folder.parent), "--clear", namespace).returncode == 0
    assert fill(namespace).cache_info().currsize == 0


COMPUTE = """
DEF f(x):
    say("running")
    told()
    return x
function = cached(f)
run(function, 1)
say(function.cache_info().currsize)
"""


def test_clear_is_not_undone_by_what_a_running_program_computes_meanwhile(start, disk_backend, command):
    program = start(COMPUTE, {**disk_backend.options, "cache_namespace": "live"})
    assert program.heard() == "running"
    assert command("--cache-dir", str(disk_backend.folder), "--clear", "live").returncode == 0
    program.tell("go on")
    assert program.heard() == 0
    program.end()


@pytest.mark.parametrize(
    ("unknown", "told"),
    [
        ("app.prize", "did you mean app.price?"),
        ("zzz", "leave out --clear"),
        ("", "leave out"),
    ],
)
def test_an_unknown_namespace_is_an_error_that_asks_for_the_nearest(fill, command, folder, unknown, told):
    fill("app.price", 1)
    fill("app.of.the.warehouse.stock", 1)
    before = snapshot(folder)
    ended = command("--cache-dir", str(folder.parent), "--clear", unknown)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert told in ended.stderr
    assert snapshot(folder) == before


def test_clear_of_a_cache_that_is_not_there_makes_nothing(command, home):
    ended = command("--clear", "app.price")
    assert ended.returncode == 2
    assert "no namespace app.price in" in ended.stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--folder-name", "a/b"], ["--cache-dir", ""], ["--clera", "x"]])
def test_wrong_arguments_are_an_error(command, arguments):
    ended = command(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "usage: python -m opero" in ended.stderr


# What cannot be read or written


@pytest.mark.parametrize("arguments", [[], ["--clear", "app.price"]], ids=" ".join)
def test_a_file_in_place_of_the_folder_of_all_is_told_in_one_line(command, tmp_path, arguments):
    (tmp_path / "file").touch()
    ended = command("--cache-dir", str(tmp_path / "file"), *arguments)
    assert ended.returncode == 1
    assert "empty" not in ended.stdout
    assert (
        ended.stderr == f"python -m opero: the folder {tmp_path / 'file' / 'opero'} cannot be read: Not a directory\n"
    )


def test_a_name_that_the_system_takes_for_too_long_is_told_in_one_line(command):
    ended = command("--cache-dir", "x" * 5000)
    assert ended.returncode == 1
    assert ended.stderr.endswith("cannot be read: File name too long\n")


@pytest.fixture
def without_rights():
    """Gives a command that runs another one for which the modes of files count, though it be root's."""
    if os.geteuid():
        return []
    rights = "-dac_override,-dac_read_search"
    if shutil.which("setpriv") is None:
        pytest.skip("root can read everything, and there is no setpriv to change that")
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]


@pytest.mark.parametrize(
    ("closed", "arguments"),
    [("the folder of all", []), ("the folder of one", []), ("the folder of one", ["--clear", "app.price"])],
)
def test_a_folder_that_cannot_be_read_is_told_by_its_reason(fill, folder, without_rights, closed, arguments):
    fill("app.price", 1)
    shut = folder if closed == "the folder of all" else folder / slug("app.price")
    shut.chmod(0)
    command = [*without_rights, sys.executable, "-m", "opero", "--cache-dir", str(folder.parent), *arguments]
    ended = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    shut.chmod(0o700)
    told = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "ermission denied" in told or "unable to open" in told
    assert not any(wrong in told for wrong in ("Traceback", "empty", "it has none"))
    assert len(ended.stderr.splitlines()) <= 1
    assert fill("app.price").cache_info().currsize == 1


def test_an_empty_name_is_seen_in_the_error(command):
    assert "no namespace '' in" in command("--clear", "").stderr
