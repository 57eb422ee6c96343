"""A notebook that a user could have written, executed by a real kernel."""

from __future__ import annotations

import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

DEFINE = """
import os
from opero import AllFailedError, candidates, opero, opmap

factor = 10

def helper(x):
    return factor * x

"""


class Notebook:
    """Executes cells, each once, and tells what each of them has shown."""

    def __init__(self, folder):
        self.folder = folder

    def shown(self, *cells):
        """What each cell printed or evaluated to; anything on its standard error fails the test."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in (DEFINE, *cells)]
        )
        client = NotebookClient(
            notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": self.folder}}
        )
        client.execute()
        saved = notebook.metadata.get("widgets", {})
        self.widgets = [widget for kind in saved.values() for widget in kind["state"].values()]
        return [_text(cell) for cell in notebook.cells[1:]]


def _text(cell):
    assert [output for output in cell.outputs if output.get("name") == "stderr"] == []
    return [output.text.strip() if "text" in output else output.data["text/plain"] for output in cell.outputs]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    # Whatever the user's own kernels are set up to do.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return Notebook(str(tmp_path))


PLAIN = """
@opmap(mode="{mode}", workers=2, retries=0, progress=False, return_exceptions=True)
def work(x, plus=0):
    if x == 3:
        raise ValueError("three")
    return helper(x) + plus

print(work([1, 2, 3], plus=1))
print(work.stats.attempts, work.stats.failures)
"""
AWAITED = PLAIN.replace("def work", "async def work").replace("work([", "await work([")


def test_functions_of_cells_are_mapped_in_every_mode(notebook):
    cells = [PLAIN.format(mode="thread"), PLAIN.format(mode="process")]
    cells += [AWAITED.format(mode="async"), AWAITED.format(mode="async_process")]
    assert notebook.shown(*cells) == [["[11, 21, ValueError('three')]\n3 1"]] * 4


def test_a_cell_that_is_executed_again_with_another_helper_is_mapped_with_that(notebook):
    work = PLAIN.format(mode="process")
    assert notebook.shown(work, "factor = 100", "print(work([1]))", work) == [
        ["[11, 21, ValueError('three')]\n3 1"],
        [],
        ["[100]"],
        ["[101, 201, ValueError('three')]\n3 1"],
    ]


def test_async_maps_stream_into_a_cell_and_refuse_to_block_it(notebook):
    cells = [
        f"""
        @opmap(mode="{mode}", workers=2, progress=False)
        async def double(x):
            return 2 * x

        print([outcome.result async for outcome in double.stream([1, 2])])
        try:
            double.run([1, 2])
        except RuntimeError as error:
            print(error)
        """
        for mode in ("async", "async_process")
    ]
    told = "double.run blocks, but this thread has a running event loop; write await in place of .run"
    assert notebook.shown(*map(textwrap.dedent, cells)) == [[f"[2, 4]\n{told}"]] * 2


def test_without_ipywidgets_a_map_shows_a_bar_of_text_and_no_warning(notebook):
    work = PLAIN.replace("progress=False", "progress=True").format(mode="thread")
    hide = "import sys\nsys.modules['ipywidgets'] = None"
    # In place of the standard error, which would fail the test.
    capture = "from IPython.utils.io import capture_output\nwith capture_output() as captured:\n"
    _, _, (text,) = notebook.shown(hide, capture + textwrap.indent(work, "    "), "print(captured.stderr)")
    assert "work: 100%" in text
    assert "Warning" not in text


BARS = """
import threading

@opmap(mode="{mode}", workers=2, retries=0, return_exceptions=True)
def work(x):
    if x == 3:
        raise ValueError("three")
    return x

strict = opmap(mode="{mode}", workers=1, retries=0, return_exceptions=False, progress="strict")(work.__wrapped__)

def call_strict():
    try:
        strict([3, 1, 2])
    except ValueError:
        pass

work(range(10))
work(x for x in range(20))
threads = [threading.Thread(target=work, args=(range(size),)) for size in (30, 40)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
call_strict()
"""


def test_bars_of_ipywidgets_show_how_far_each_map_came_and_whether_it_reached_its_end(notebook):
    pytest.importorskip("ipywidgets")
    modes = ["thread", "process"]
    notebook.shown(*[BARS.format(mode=mode) for mode in modes])
    bars = [bar["state"] for bar in notebook.widgets if bar["model_name"] == "FloatProgressModel"]
    # The second map does not know how many items there will be.
    assert sorted((bar["value"], bar["bar_style"]) for bar in bars) == [
        *[(1, "danger")] * len(modes),
        *[(1, "success")] * len(modes),
        *[(10, "success")] * len(modes),
        *[(30, "success")] * len(modes),
        *[(40, "success")] * len(modes),
    ]


def test_resilient_functions_of_cells_are_called_and_awaited(notebook):
    plain = """
tries = []

@opero(cache=True, min_delay=0.01, retries=3, arg_fallback="key")
def ask(question, key=candidates("bad", "good")):
    tries.append(key)
    if len(tries) < 4:
        raise ConnectionError(key)
    return question + key

print(ask("why? "), ask("why? "), tries, ask.stats.hits)
"""
    awaited = (
        plain.replace("def ask", "async def ask").replace("(ask(", "(await ask(").replace(", ask(", ", await ask(")
    )
    told = "why? good why? good ['bad', 'good', 'bad', 'good'] 1"
    assert notebook.shown(plain, awaited) == [[told], [told]]


def test_an_error_in_a_cell_shows_that_of_the_function(notebook):
    cell = """
@opero(retries=1, min_delay=0)
def fail():
    raise ConnectionError("away")

try:
    fail()
except ConnectionError as error:
    print(error, len(error.__notes__))
"""
    assert notebook.shown(cell) == [["away 1"]]


def test_a_disk_cache_keeps_what_functions_of_cells_have_given(notebook):
    cell = """
@opero(cache=True, cache_backend="disk", cache_options={"cache_dir": "cache"})
def ask(x):
    return [x]

print(ask(1), ask(1), ask.stats.hits)
"""
    assert notebook.shown(cell) == [["[1] [1] 1"]]
    assert notebook.shown(cell) == [["[1] [1] 2"]]
