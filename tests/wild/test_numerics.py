"""Maps in processes after libraries have started threads of their own, beside which a fork may hang or die."""

from __future__ import annotations

import textwrap

import pytest

PROGRAM = """
from opero import opmap

{use}

@opmap(retries=0, workers=2, progress=False)
def work(x):
    return use() + x

if __name__ == "__main__":
    here = [use() + x for x in range(4)]
    assert list(work(range(4))) == here
"""

USES = {
    "numpy": """
        import numpy

        def use():
            ones = numpy.ones((300, 300))
            return int((ones @ ones).sum())
    """,
    "pandas": """
        import pandas

        def use():
            return int(pandas.DataFrame({"a": [1, 1, 2], "b": [1, 2, 3]}).groupby("a").b.sum().max())
    """,
    "scikit-learn": """
        import numpy
        from sklearn.cluster import KMeans

        points = numpy.random.default_rng(0).random((2000, 4))

        def use():
            return len(set(KMeans(3, n_init=1, random_state=0).fit(points).labels_))
    """,
    "polars": """
        import polars

        def use():
            frame = polars.DataFrame({"a": range(1000), "b": range(1000)})
            return frame.lazy().group_by("a").agg(polars.col("b").sum()).collect()["b"].sum()
    """,
    "numba": """
        import numba
        import numpy

        @numba.njit(parallel=True, cache=True)
        def total(numbers):
            found = 0.0
            for i in numba.prange(len(numbers)):
                found += numbers[i]
            return found

        def use():
            return int(total(numpy.ones(1000)))
    """,
}


@pytest.mark.parametrize("library", USES)
def test_a_map_runs_after_the_library_was_used(program, library):
    program(PROGRAM.format(use=textwrap.dedent(USES[library])))


COUNT_THREADS = """
{before}
from opero import opmap

def of_numba(_item):
    import numba
    import numpy

    @numba.njit(parallel=True)
    def total(numbers):
        found = 0.0
        for i in numba.prange(len(numbers)):
            found += numbers[i]
        return found

    return int(total(numpy.ones(1000))), numba.get_num_threads()

def of_polars(_item):
    import polars
    return int(polars.Series([1000]).sum()), polars.thread_pool_size()

if __name__ == "__main__":
    pool_options = {{"start_method": {method!r}, "threads_per_worker": 1}}
    print(opmap(workers=1, retries=0, progress=False, pool_options=pool_options)({function})([0]))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("before", ["", "import numba"], ids=["imported there", "imported before"])
def test_numba_has_as_many_threads_as_a_worker_may_have(program, method, before):
    assert program(COUNT_THREADS.format(before=before, method=method, function="of_numba")) == "[(1000, 1)]"


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_polars_has_as_many_threads_as_a_worker_may_have(program, method):
    assert program(COUNT_THREADS.format(before="", method=method, function="of_polars")) == "[(1000, 1)]"


def test_numba_whose_threads_have_started_compiles_in_forked_workers(program):
    assert (
        program("""
        import numba
        from opero import opmap

        def work(item):
            return numba.njit(lambda x: x + 1)(item), numba.get_num_threads()

        if __name__ == "__main__":
            numba.get_num_threads()
            pool_options = {"start_method": "fork", "threads_per_worker": 1}
            print(opmap(workers=1, retries=0, progress=False, pool_options=pool_options)(work)([1]))
    """)
        == "[(2, 1)]"
    )


def test_a_fitted_model_is_an_argument_of_a_map(program):
    program("""
        import numpy
        from sklearn.linear_model import LinearRegression

        from opero import opmap

        @opmap(retries=0, workers=2, progress=False)
        def predict(x, model):
            return round(float(model.predict([[x]])[0]))

        if __name__ == "__main__":
            model = LinearRegression().fit([[0], [1], [2]], [0, 2, 4])
            assert list(predict([3, 4], model=model)) == [6, 8]
    """)


def test_frames_of_polars_are_items_of_a_map(program):
    program("""
        import polars

        from opero import opmap

        @opmap(retries=0, workers=2, progress=False)
        def doubled(frame):
            return frame.with_columns(b=polars.col("a") * 2)

        if __name__ == "__main__":
            frames = [polars.DataFrame({"a": [n, n + 1]}) for n in range(3)]
            assert [frame["b"].to_list() for frame in doubled(frames)] == [[0, 2], [2, 4], [4, 6]]
    """)


USES_JOBLIB = """
    import time
    from joblib import Parallel, delayed
    from opero import opmap

    def square(number):
        return number * number

    def sum_of_squares(count):
        return sum(Parallel(n_jobs=2)(delayed(square)(number) for number in range(count)))

    if __name__ == "__main__":
        begun = time.monotonic()
        print(opmap(workers=2, retries=0, progress=False)(sum_of_squares)([3, 4]), time.monotonic() - begun < 25)
"""


def test_items_that_use_joblibs_processes_do_not_hold_up_the_end_of_their_map(program):
    assert program(USES_JOBLIB) == "[5, 14] True"
