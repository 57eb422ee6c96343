"""What workers have of the main module: its classes are the same there, and so are its functions and its state."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest

from opero.concurrency.pickling import Packer

SCRIPT = """
    import concurrent.futures, multiprocessing, sys, threading
    from dataclasses import dataclass
    from opero import opmap

    @dataclass
    class Point:
        x: int

    class FlakyError(Exception):
        pass

    def make():
        seen = set()

        def work(point):
            if point.x == 2 and point.x not in seen:
                seen.add(point.x)
                raise FlakyError(point.x)
            return isinstance(point, Point), point == Point(point.x), Point(point.x)

        return work

    def main(mode):
        work = opmap(**mode, workers=1, retries=1, retry_on=FlakyError, min_delay=0.001, progress=False)(make())
        results = work([Point(1), Point(2), Point(3)])
        print(results == [(True, True, Point(x)) for x in (1, 2, 3)], work.stats.retries)

    if __name__ == "__main__":
        for mode in EACH_MODE:
            main(mode)
"""
EXECUTOR = "mode=lambda: concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context({!r}))"
# Those that fork come first, while the program has no threads.
MODES = {
    "fork": "mode='process', pool_options={'start_method': 'fork'}",
    "executor, fork": EXECUTOR.format("fork"),
    "spawn": "mode='process', pool_options={'start_method': 'spawn'}",
    "forkserver": "mode='process', pool_options={'start_method': 'forkserver'}",
    "executor, spawn": EXECUTOR.format("spawn"),
    "loky": "mode=lambda: __import__('loky').ProcessPoolExecutor(1)",
}


# Python starts the workers of an executor from the program's file, if they are spawned.
WITHOUT_FILE = [mode for mode in MODES if mode != "executor, spawn"]
# Workers that have the main module, that get it from its file, and, of others, that have none to get.
DIFFERENT = {"file": ["fork", "spawn", "loky"], "-c": ["spawn"]}


def in_each(modes, source):
    """The source with the options of these modes, or with these options."""
    options = [f"dict({MODES.get(mode, mode)})" for mode in modes]
    return textwrap.dedent(source).replace("EACH_MODE", f"[{', '.join(options)}]")


def run_main(folder, source, *, way):
    path = folder / "script.py"
    path.write_text(source)
    command = [sys.executable, *{"file": [path], "-c": ["-c", source], "stdin": []}[way]]
    given = source if way == "stdin" else ""
    run = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    assert run.stderr == ""
    return run.stdout


@pytest.mark.parametrize(("way", "modes"), [("file", MODES), ("-c", WITHOUT_FILE)])
def test_a_class_of_the_main_module_is_one_class_in_the_caller_and_the_workers(tmp_path, way, modes):
    assert run_main(tmp_path, in_each(modes, SCRIPT), way=way) == "True 1\n" * len(modes)


KINDS = """
    import concurrent.futures, multiprocessing
    from dataclasses import dataclass
    from enum import Enum
    from typing import Generic, TypeVar
    from opero import opmap

    T = TypeVar("T")

    class BaseFault(Exception):
        pass

    class Fault(BaseFault):
        pass

    class Color(Enum):
        RED = 1

        def text(self):
            return self.name.lower()

    class Box(Generic[T]):
        def __init__(self, content):
            self.content = content

    class Size:
        factor = 3

    @dataclass
    class Tile:
        side: int

        def area(self):
            return self.side * Size.factor

    class Outer:
        class Inner:
            pass

    Inner = Outer.Inner

    class Egg:
        def other(self):
            return Hen()

    class Hen:
        def other(self):
            return Egg()

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @opmap(MODE, workers=1, retries=0, progress=False)
        def times(self, item):
            return self.factor * item

    def is_caught_by_its_base(_):
        try:
            raise Fault
        except BaseFault:
            return True

    def is_even(item):
        return item == 0 or is_odd(item - 1)

    def is_odd(item):
        return item != 0 and is_even(item - 1)

    def make_others(_):
        return type(Inner()) is Outer.Inner, type(Egg().other()) is Hen, type(Hen().other()) is Egg, Inner()

    def get_factors(_, size, *, other):
        return isinstance(size, Size), isinstance(other, Size), size.factor, other.factor

    def by_name(name):
        if name == "fault":
            return is_caught_by_its_base(name)
        return [is_even(4), is_even(3)] if name == "numbers" else make_others(name)

    def main():
        def mapped(function):
            return opmap(MODE, workers=1, retries=0, progress=False)(function)

        # Each map has workers that know nothing of the others'.
        is_caught, are_even, (*known, inner) = mapped(by_name)(["fault", "numbers", "others"])
        print(is_caught, are_even, known, type(inner) is Inner)
        ((color, text, box),) = mapped(lambda item: (Color(item), Color(item).text(), Box[int](item)))([1])
        print(color is Color.RED, text, type(box) is Box)
        items = [Color.RED, Tile(1), Tile(2)]
        print(mapped(lambda item: item.text() if isinstance(item, Color) else item.area())(items))
        print(mapped(get_factors)([1], Size(), other=Size()))
        print(Scale(3).times([5]))

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(("way", "mode"), [(way, mode) for way, modes in DIFFERENT.items() for mode in modes])
def test_what_the_main_module_defines_works_in_workers_as_in_the_caller(tmp_path, way, mode):
    source = textwrap.dedent(KINDS).replace("MODE", MODES[mode])
    expected = [
        "True [True, False] [True, True, True] True",
        "True red True",
        "['red', 3, 6]",
        "[(True, True, 3, 3)]",
        "[15]",
    ]
    assert run_main(tmp_path, source, way=way).splitlines() == expected


GUARDED = """
    from opero import opmap

    if __name__ == "__main__":
        class Point:
            pass

        @opmap(mode="process", workers=1, retries=0, progress=False, pool_options={"start_method": METHOD})
        def make(item):
            return helper(item), type(item) is Point

        def helper(item):
            return type(item).__name__

        print(make([Point()]))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_is_defined_only_where_the_file_is_run_reaches_fresh_workers(tmp_path, method):
    source = textwrap.dedent(GUARDED).replace("METHOD", repr(method))
    assert run_main(tmp_path, source, way="file") == "[('Point', True)]\n"


WORDS_AND_CASES = '''
    """Add what was set.

    work is no function where this file is imported.
    """
    if __name__ == "__main__":
        import multiprocessing
        multiprocessing.freeze_support()
    from opero import opmap

    def prepare(value):
        global SET
        SET = value

    try:
        from nowhere import add
    except ImportError:
        def add(item):
            return item + SET

    if __name__ == "__main__":
        def work(item):
            return item + 1

        options = {"start_method": "METHOD", "initializer": prepare, "initargs": (10,)}
        print(*(opmap(workers=1, retries=0, progress=False, pool_options=options)(each)([1]) for each in (work, add)))
'''


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_fresh_workers_have_what_the_file_binds_in_whichever_way_and_not_what_it_mentions(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(WORDS_AND_CASES).replace("METHOD", method))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("[2] [11]\n", "")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_functions_of_a_package_that_is_run_reach_fresh_workers(tmp_path, method):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    options = f"retries=0, progress=False, pool_options={{'start_method': {method!r}}}"
    source = (
        f"from opero import opmap\n@opmap({options})\ndef double(item):\n    return 2 * item\nprint(double([1, 2]))\n"
    )
    (package / "__main__.py").write_text(source)
    command = [sys.executable, "-m", "package"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("[2, 4]\n", "")


STATE = """
    import multiprocessing, threading
    from opero import opmap

    STATE = None

    def prepare(*given):
        global STATE
        STATE = given

    context = multiprocessing.get_context("spawn")

    async def read(item):
        number, lock, end, function = STATE
        with lock:
            number.value += item
        end.send(item)
        return function(item)

    def main(mode, method):
        ours, theirs = context.Pipe()
        number = context.Value("i", 0)
        initargs = (number, context.Lock(), theirs, lambda item: -item)
        options = {"start_method": method, "initializer": prepare, "initargs": initargs}
        print(opmap(mode=mode, workers=2, retries=0, progress=False, pool_options=options)(read).run([1, 2, 3]))
        print(number.value, sorted(ours.recv() for _ in range(3)))

    if __name__ == "__main__":
        for method in ("fork", "spawn", "forkserver"):
            main("process", method)
        main("async_process", "spawn")
"""


def test_an_initializer_gives_the_main_module_what_can_only_be_inherited(tmp_path):
    assert run_main(tmp_path, textwrap.dedent(STATE), way="file") == "[-1, -2, -3]\n6 [1, 2, 3]\n" * 4


OWN_MODULE = """
    import concurrent.futures, multiprocessing, settings
    from opero import opmap

    def look(_):
        return settings.state

    if __name__ == "__main__":
        executor = concurrent.futures.ProcessPoolExecutor(1, initializer=settings.prepare)
        print(opmap(mode=executor, workers=1, retries=0, progress=False)(look)([1]))
        print(executor.submit(settings.look).result())
        executor.shutdown()
        options = {"start_method": "spawn", "initializer": settings.prepare}
        print(opmap(workers=1, retries=0, progress=False, pool_options=options)(lambda _: settings.state)([1]))
"""


def test_the_modules_of_the_program_are_not_copied(tmp_path):
    (tmp_path / "settings.py").write_text(
        "import sqlite3\nconnection = sqlite3.connect(':memory:')\nstate = 'fresh'\n"
        "def prepare():\n    global state\n    state = 'prepared'\ndef look():\n    return state\n"
    )
    source = textwrap.dedent(OWN_MODULE)
    assert run_main(tmp_path, source, way="file") == "['prepared']\nprepared\n['prepared']\n"


INITIALIZED = """
    import concurrent.futures, multiprocessing, sqlite3, sys
    from opero import opmap

    STATE = None
    CONNECTION = sqlite3.connect(":memory:")

    def prepare():
        global STATE
        STATE = "prepared"

    def read(item):
        return STATE, CONNECTION.execute(f"select {item}").fetchone()

    if __name__ == "__main__":
        for method in ("fork", "spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as executor:
                print(opmap(mode=executor, retries=0, progress=False)(read)([1]))
"""


def test_an_executor_that_has_the_main_module_runs_its_functions_there(tmp_path):
    assert run_main(tmp_path, textwrap.dedent(INITIALIZED), way="file") == "[('prepared', (1,))]\n" * 3


CHANGED = """
    import concurrent.futures, multiprocessing
    from opero import opmap

    def work(item):
        return "old"

    def main():
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
            print(opmap(mode=executor, retries=0, progress=False)(work)([1]))
            exec("def work(item):\\n    return 'new'", globals())
            print(opmap(mode=executor, retries=0, progress=False)(work)([1]))

    if __name__ == "__main__":
        main()
"""


def test_a_function_that_was_defined_anew_is_not_taken_for_the_old_one_that_a_worker_has(tmp_path):
    assert run_main(tmp_path, textwrap.dedent(CHANGED), way="-c") == "['old']\n['new']\n"


PREPARED = """
    import functools
    from opero import opmap

    STATE = {}

    def put(value, *_):
        STATE["value"] = value

    class Setting:
        def __init__(self, value):
            self.value = value

        def apply(self):
            STATE["value"] = self.value

        def __call__(self):
            put(self.value)

    async def read(_):
        return STATE.get("value")

    if __name__ == "__main__":
        for method in ("fork", "spawn", "forkserver"):
            for initializer in (functools.partial(put, 1), Setting(2).apply, Setting(3), lambda: put(4)):
                options = {"start_method": method, "initializer": initializer}
                mapped = opmap(mode="process", workers=1, retries=0, progress=False, pool_options=options)(read)
                print(mapped.run([0]), end=" ")
"""


def test_whatever_calls_a_function_of_the_main_module_prepares_that_of_the_worker(tmp_path):
    assert run_main(tmp_path, textwrap.dedent(PREPARED), way="file") == "[1] [2] [3] [4] " * 3


HIDDEN = """
    import sys
    from collections import namedtuple
    from opero import opmap

    def main():
        DEFINITION
        options = {"start_method": METHOD}
        print(opmap(workers=1, retries=0, progress=False, pool_options=options)(lambda item: Point(item).x)([1]))

    if __name__ != "__main__":
        pass
    else:
        main()
"""
DEFINITIONS = {
    "assigned": "global Point; Point = namedtuple('Point', 'x')",
    "global": "global Point\n    class Point:\n        def __init__(self, x): self.x = x",
    "exec": "exec('class Point:\\n    def __init__(self, x): self.x = x', globals())",
}


@pytest.mark.parametrize(
    ("definition", "method"),
    [("assigned", "spawn"), ("assigned", "forkserver"), ("global", "spawn"), ("exec", "spawn")],
)
def test_a_class_that_the_file_does_not_show_travels_with_the_function(tmp_path, method, definition):
    source = textwrap.dedent(HIDDEN).replace("DEFINITION", DEFINITIONS[definition]).replace("METHOD", repr(method))
    assert run_main(tmp_path, source, way="file") == "[1]\n"


CIRCLES = """
    import concurrent.futures, gc, multiprocessing
    from opero import opmap

    # Leaves room for what comes after Shape below it in memory: no order of addresses may matter.
    room = [type("Room", (), {}) for _ in range(100)]

    class Shape:
        kinds = {}

        def __init_subclass__(cls):
            Shape.kinds[cls.__name__] = cls

    del room
    gc.collect()

    class Dot(Shape):
        pass

    class Single:
        only = None

    Single.only = Single()

    def name(item):
        return type(item).__name__, type(item) in (*Shape.kinds.values(), type(Single.only))

    if __name__ == "__main__":
        for mode in EACH_MODE:
            print(opmap(**mode, workers=1, retries=0, progress=False)(name)([Dot(), Single()]))
"""


@pytest.mark.parametrize(("way", "modes"), DIFFERENT.items())
def test_a_class_that_leads_back_to_itself_is_known_to_workers(tmp_path, way, modes):
    assert run_main(tmp_path, in_each(modes, CIRCLES), way=way) == "[('Dot', True), ('Single', True)]\n" * len(modes)


GLOBALS = """
    import concurrent.futures, multiprocessing
    from opero import opmap
    from marks import marked

    NAME, CACHE, COUNT, LIMIT = None, {}, 0, 1

    def prepare(name):
        global NAME
        NAME = name
        CACHE["at"] = name

    def count():
        global COUNT
        COUNT += 1

    @marked
    def look():
        return NAME, CACHE

    def read(item):
        count()
        return item, COUNT, look()

    if __name__ == "__main__":
        LIMIT = 3
        for mode in EACH_MODE:
            for function in (read, lambda item: (*read(item), LIMIT)):
                print(opmap(**mode, workers=1, retries=0, progress=False)(function)([1, 2]))
"""
# A decorator's wrapper has another module's globals, and the name of its function's.
MARKS = """
    import functools
    NAME, COUNT = "of marks", 70

    def marked(function):
        @functools.wraps(function)
        def wrapper():
            return (*function(), NAME, COUNT)
        return wrapper
"""


def assert_functions_see(looked, folder, modes, *, way):
    (folder / "marks.py").write_text(textwrap.dedent(MARKS))
    expected = [f"{[(1, 1, looked), (2, 2, looked)]}", f"{[(1, 1, looked, 3), (2, 2, looked, 3)]}"]
    assert run_main(folder, in_each(modes, GLOBALS), way=way).splitlines() == expected * len(modes)


@pytest.mark.parametrize(
    ("way", "methods"), [("file", ["fork", "spawn", "forkserver"]), ("-c", ["spawn"]), ("stdin", ["spawn"])]
)
def test_what_an_initializer_sets_is_seen_by_the_function_and_all_that_it_calls(tmp_path, way, methods):
    prepared = "pool_options={{'start_method': {!r}, 'initializer': prepare, 'initargs': ('n',)}}"
    looked = ("n", {"at": "n"}, "of marks", 70)
    assert_functions_see(looked, tmp_path, [prepared.format(method) for method in methods], way=way)


def test_functions_that_call_each_other_share_their_globals(tmp_path):
    assert_functions_see((None, {}, "of marks", 70), tmp_path, ["fork", "spawn", "loky"], way="-c")


COUNTED = """
    import loky
    from opero import opmap

    class Counted:
        made = 0

        def __init__(self):
            Counted.made += 1

    class Left:
        def other(self):
            return Right()

    class Right:
        def other(self):
            return Left()

    def is_counted(item, cls=Counted):
        return isinstance(item, cls)

    def is_pair(item, classes=(Left, Right)):
        return isinstance(item, classes)

    if __name__ == "__main__":
        options = dict(workers=1, retries=0, progress=False)
        spawning = {"start_method": "spawn"}
        mapped = opmap(pool_options=spawning, **options)(is_counted)
        with mapped.pool():
            print(mapped([Counted()]), mapped([Counted(), Counted()]))
        print(opmap(pool_options=spawning, **options)(is_pair)([Left(), Right(), Left()]))
        with loky.ProcessPoolExecutor(1) as executor:
            slow = opmap(mode=executor, **options)(is_counted).stream(Counted() for _ in range(20))
            first = next(slow).result
            print(first, opmap(mode=executor, **options)(is_counted)([Counted()]), {outcome.result for outcome in slow})
"""


def test_a_class_that_changes_by_itself_stays_the_same_one_in_a_worker(tmp_path):
    expected = "[True] [True, True]\n[True, True, True]\nTrue [True] {True}\n"
    assert run_main(tmp_path, textwrap.dedent(COUNTED), way="-c") == expected


SHOWN = """
    import threading
    from opero import opmap

    class Shape:
        default = None

        def registry(self):
            return Registry

    class Dot(Shape):
        pass

    class Connection:
        def __getstate__(self):
            print("pickled")
            return {}

    class Registry:
        kinds = {"shape": Shape, "dot": Dot}
        lock = threading.Lock()
        connection = Connection()

    def look(item):
        return isinstance(item, Shape), isinstance(Dot(), Shape), item.registry() is Registry

    if __name__ == "__main__":
        class Square(Shape):
            pass

        Shape.default = Square
        mapped = opmap(workers=1, retries=0, progress=False, pool_options={"start_method": "spawn"})
        for function in (look, lambda item: look(item)):
            print(mapped(function)([Dot()]), mapped(function)([Square(), Dot()]))
"""


def test_a_class_that_the_file_shows_is_the_workers_own_and_is_not_copied(tmp_path):
    every = (True, True, True)
    expected = f"{[every]} {[every, every]}\n" * 2
    assert run_main(tmp_path, textwrap.dedent(SHOWN), way="file") == expected


DECLARED = """
    import concurrent.futures, multiprocessing
    from typing import Generic, NamedTuple, NewType, ParamSpec
    from opero import opmap

    UserId = NewType("UserId", int)
    P = ParamSpec("P")

    class Pair(NamedTuple):
        x: int
        y: int = 5

        def total(self):
            return self.x + self.y

    class Call(Generic[P]):
        value = 4

    def work(x) -> UserId:
        return UserId(x), Pair(x).total(), Call().value

    if __name__ == "__main__":
        for mode in EACH_MODE:
            mapped = opmap(**mode, workers=1, retries=0, progress=False)
            print(mapped(work)([1]), mapped(lambda pair: pair.total())([Pair(1)]))
"""


def test_what_typing_declares_in_the_main_module_is_whole_in_workers(tmp_path):
    assert run_main(tmp_path, in_each(["spawn", "loky"], DECLARED), way="-c") == "[(1, 6, 4)] [6]\n" * 2


OWN_METHODS = """
    import concurrent.futures, multiprocessing
    from opero import opmap

    class Model:
        @classmethod
        def check(cls, value):
            return cls, value

    # As pydantic notes the validators of a class.
    Model.checks = [Model.check]

    def work(value, model=Model):
        cls, checked = model.checks[0](value)
        return cls is Model and model is Model, checked

    if __name__ == "__main__":
        for mode in EACH_MODE:
            mapped = opmap(**mode, workers=1, retries=0, progress=False)
            print(mapped(work)([1]), mapped(work)([2], model=Model))
"""


def test_a_class_of_the_main_module_may_hold_methods_of_its_own(tmp_path):
    expected = "[(True, 1)] [(True, 2)]\n" * 3
    assert run_main(tmp_path, in_each(["spawn", "forkserver", "loky"], OWN_METHODS), way="-c") == expected


CACHED = """
    import concurrent.futures, functools, multiprocessing, sys
    from opero import opmap

    @functools.lru_cache(maxsize=8)
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    if sys.version_info >= (3, 12):
        exec("type Number = int")
    else:
        Number = int

    def work(n) -> Number:
        return fib(n), fib.cache_parameters()["maxsize"]

    if __name__ == "__main__":
        for mode in EACH_MODE:
            mapped = opmap(**mode, workers=1, retries=0, progress=False)
            print(mapped(work)([90]), mapped(fib)([5]))
"""


def test_cached_functions_and_aliases_of_the_main_module_go_where_it_is_not(tmp_path):
    expected = "[(2880067194370816120, 8)] [5]\n" * 2
    assert run_main(tmp_path, in_each(["spawn", "loky"], CACHED), way="-c") == expected


EACH_A_MAIN = """
    import sys, types

    def run(name):
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        module.__file__ = name
        exec(compile(open(name).read(), name, "exec"), vars(module))

    if __name__ == "__main__":
        with open("page.py", "w") as file:
            file.write(PAGE)
        for _ in range(2):
            run("page.py")
"""
PAGE = """
from opero import opmap

class Point:
    pass

def work(item):
    return Point()

if __name__ == "__main__":
    mapped = opmap(workers=1, retries=0, progress=False, pool_options={"start_method": "spawn"})(work)
    print(type(mapped([1])[0]) is Point)
"""


def test_results_are_of_the_classes_of_whichever_main_module_is_there_now(tmp_path):
    # As streamlit runs a page, and IPython a script.
    source = textwrap.dedent(EACH_A_MAIN).replace("PAGE", repr(PAGE))
    assert run_main(tmp_path, source, way="file") == "True\nTrue\n"


HELD = """
    import concurrent.futures, enum, functools, multiprocessing, threading
    from typing import Generic, TypeVar
    from opero import opmap

    T = TypeVar("T")

    class Planet(enum.Enum):
        EARTH = (5.97, 6.4)

        @property
        def mass(self):
            return self.value[0]

    class Level(enum.IntEnum):
        LOW = 1

        @property
        def label(self):
            return self.name.lower()

    class Right(enum.Flag):
        READ = 1
        WRITE = 2

    class Form:
        def __init__(self):
            self.clicks = 0
            self.on_click = lambda: self.add()

        def add(self):
            self.clicks += 1

    class Tree(Generic[T]):
        class Node:
            pass

    class Job:
        class State(enum.Enum):
            NEW = 1

        class Info:
            pass

    class Guarded:
        lock = threading.RLock()

        @functools.cached_property
        def size(self):
            with self.lock:
                return 3

    def use(planet):
        return planet is Planet.EARTH, Planet.EARTH.mass, Level.LOW.label, Guarded().size

    def combine(right):
        return right is Right.READ | Right.WRITE, right.name, right

    def press(form):
        form.on_click()
        return form.clicks

    def make(_):
        return Tree.Node(), Job.Info(), Job.State.NEW

    def is_even(item):
        return item % 2 == 0

    def choose(item, f, *, g):
        return f(item), g(item)

    def by_kind(item):
        function = {Planet: use, Right: combine, Form: press}.get(type(item), make)
        return function(item)

    if __name__ == "__main__":
        mapped = opmap(MODE, workers=1, retries=0, progress=False)
        both = Right.READ | Right.WRITE
        used, combined, clicks, (node, info, state) = mapped(by_kind)([Planet.EARTH, both, Form(), 1])
        print(used, combined == (True, "READ|WRITE", both), clicks)
        print(type(node) is Tree.Node, type(info) is Job.Info, state is Job.State.NEW)
        print(mapped(lambda f: f(4))([is_even, lambda x: -x, abs]))
        print(mapped(choose)([4], lambda x: x + 1, g=is_even))
        with_candidates = opmap(MODE, workers=1, retries=0, progress=False, arg_fallback="f")
        print(with_candidates(choose)([4], [lambda x: 1 / 0, is_even], g=abs))
"""


@pytest.mark.parametrize(("mode", "way"), [("spawn", "-c"), ("loky", "file"), ("spawn", "file")])
def test_what_classes_hold_and_functions_that_are_given_arrive_in_workers(tmp_path, mode, way):
    source = textwrap.dedent(HELD).replace("MODE", MODES[mode])
    assert run_main(tmp_path, source, way=way).splitlines() == [
        "(True, 5.97, 'low', 3) True 1",
        "True True True",
        "[True, -4, 4]",
        "[(5, True)]",
        "[(True, 4)]",
    ]


UNSENDABLE = """
    import functools, loky
    from opero import opmap

    @functools.singledispatch
    def one(item):
        return item

    def work(item):
        return one(item)

    if __name__ == "__main__":
        try:
            opmap(mode=lambda: loky.ProcessPoolExecutor(1), workers=1, retries=0, progress=False)(work)([1])
        except Exception as error:
            print(error)
"""


def test_why_a_function_of_the_main_module_cannot_be_sent_to_an_executor_is_told(tmp_path):
    told = run_main(tmp_path, textwrap.dedent(UNSENDABLE), way="file")
    assert "cannot pickle 'weakref" in told


REDEFINED = """
    import concurrent.futures, functools, multiprocessing
    from opero import opmap

    def logged(function):
        @functools.wraps(function)
        def inner(*its):
            return function(*its)
        return inner

    TEXT = '''
    @logged
    def work(_):
        return "AGE"

    def default(_, age="AGE"):
        return age
    '''
    exec(TEXT.replace("AGE", "old"))
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor:
        mapped = opmap(mode=executor, retries=0, progress=False)
        print(mapped(work)([1]), mapped(default)([1]))
        exec(TEXT.replace("AGE", "new"))
        print(mapped(work)([1]), mapped(default)([1]))
"""


def test_a_function_that_is_defined_anew_with_the_same_code_is_sent_to_workers_that_have_the_old_one(tmp_path):
    assert run_main(tmp_path, textwrap.dedent(REDEFINED), way="-c") == "['old'] ['old']\n['new'] ['new']\n"


UNCOPYABLE = """
    from opero import opmap

    class Numbers:
        left = (number for number in range(3))

    try:
        opmap(workers=1, retries=0, progress=False, pool_options={"start_method": "spawn"})(lambda _: Numbers)([1])
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_why_a_function_cannot_be_sent_that_uses_a_class_which_cannot_be_copied_is_told(tmp_path):
    said = run_main(tmp_path, textwrap.dedent(UNCOPYABLE), way="-c")
    assert said.startswith("NotTransferableError <lambda> or its keyword arguments cannot be sent")
    assert "cannot pickle 'generator' object" in said


def test_what_other_threads_print_and_warn_of_is_not_lost_while_a_function_is_pickled(monkeypatch):
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    lines = "".join(f"    x = abs(x) + {number}\n" for number in range(400))
    names = {"__name__": "elsewhere"}
    exec(f"def long(x):\n{lines}    return (lambda: abs(x))()", names)
    is_over = threading.Event()

    def pickle_again_and_again():
        while not is_over.is_set():
            Packer().dumps(names["long"])

    threads = [threading.Thread(target=pickle_again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = warnings.filters.copy()
    for _ in range(500):
        assert sys.stdout is stdout
        assert warnings.filters == before
        time.sleep(0)
    is_over.set()
    for thread in threads:
        thread.join()
    assert stdout.getvalue() == ""


@pytest.mark.parametrize("imported", ["import slow", "from slow import Slow", "from slow import slow"])
def test_the_fork_server_imports_what_the_main_module_does_once_for_all_workers(tmp_path, imported):
    (tmp_path / "slow.py").write_text(
        "import os\n"
        "with open('imports', 'a') as file: print(os.getpid(), file=file)\n"
        "class Slow: pass\n"
        "def slow(): pass\n"
    )
    source = f"""
        from opero import opmap
        {imported}

        @opmap(workers=2, progress=False, pool_options={{"start_method": "forkserver"}})
        def work(item):
            return item

        if __name__ == "__main__":
            print(work([1, 2, 3]))
    """
    assert run_main(tmp_path, textwrap.dedent(source), way="file") == "[1, 2, 3]\n"
    assert len((tmp_path / "imports").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_module_may_map_its_own_function_while_it_is_imported(tmp_path, method):
    (tmp_path / "module.py").write_text(
        textwrap.dedent(f"""
            import multiprocessing
            from opero import opmap

            @opmap(workers=2, retries=0, progress=False, pool_options={{"start_method": {method!r}}})
            def square(x):
                return x * x

            if multiprocessing.current_process().name == "MainProcess":
                print(square([1, 2, 3]))
        """)
    )
    assert run_main(tmp_path, "import module", way="-c").split("\n")[-2] == "[1, 4, 9]"


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="starts no thread and no process when the program ends")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_exit_handler_may_map(tmp_path, method):
    source = f"""
        import atexit
        from opero import opmap

        @opmap(workers=2, retries=0, progress=False, pool_options={{"start_method": {method!r}}})
        def square(x):
            return x * x

        if __name__ == "__main__":
            atexit.register(lambda: print(square([1, 2, 3])))
    """
    assert run_main(tmp_path, textwrap.dedent(source), way="file") == "[1, 4, 9]\n"


def test_a_script_maps_under_the_debugger(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(in_each(["fork", "spawn", "forkserver"], SCRIPT))
    command = [sys.executable, "-m", "pdb", "-c", "continue", path]
    run = subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.count("True 1\n") == 3
