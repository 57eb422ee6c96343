"""Limits that processes share, by a file or by a redis server: how many start, who dies, and what fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from side_by_side import SECONDS, forked, note_turns, results, started, until
from test_rate_limit import Timed, limited, order_of_tasks, worst_excess

import opero
from opero.core import CallTimeoutError, MisuseError, RateLimiter, UnsafeCacheError, faults
from opero.core.limits.gates import FileGate, RedisGate
from opero.core.limits.ledger import changed
from opero.core.limits.line import ONE, Line, Turn
from opero.core.limits.rates import parse_rates
from opero.core.steps import drive

thoroughly = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
LIMITED = 50
# How much later than its slot a start may be written down on a busy machine, as a part of a second.
LATE = 0.1


@pytest.fixture(params=["machine", "redis"])
def scope(request, tmp_path):
    """Options of limits that the processes of one test share."""
    if request.param == "machine":
        return {"scope": "machine", "folder": str(tmp_path / "shared")}
    server = request.getfixturevalue("redis_server")
    return {"scope": "redis", "url": f"redis://{server.host}:{server.port}"}


@pytest.fixture
def name():
    return os.urandom(8).hex()


def key_of(name):
    return f"opero:limit:{{{name}}}"


def url_of(backend):
    return f"redis://{backend.server.host}:{backend.server.port}"


# The arithmetic of the file


@pytest.fixture
def open_gate(tmp_path, fake_clock):
    def make(rate, name="limit", *, folder="shared", max_burst=1, **options):
        return Asker(FileGate(name, tmp_path / folder), parse_rates(rate, max_burst, **options))

    return make


class Asker:
    """One process that asks a gate, at its rates."""

    def __init__(self, gate, rates):
        self.gate, self.rates = gate, rates

    def ask(self, *amounts, who=0.0, claims=False):
        """Seconds to wait for a slot; 0 if it was taken."""
        return self.act(lambda ledger, now: ledger.ask(now, amounts or (1.0,), who, is_late=True, claims=claims))

    def act(self, act):
        (answer,) = self.gate.answers([partial(changed, self.rates, act)])
        if isinstance(answer, Exception):
            raise answer
        return answer


def takes(asker, pause=0.0):
    return asker.act(lambda ledger, now: ledger.pause(now + min(pause, 3_600))) if pause else asker.ask()


def test_a_gate_tells_how_long_until_the_next_slot(open_gate, fake_clock):
    gate = open_gate(4)
    assert [takes(gate), takes(gate)] == [0, pytest.approx(0.25)]
    fake_clock.tick(0.2)
    assert takes(gate) == pytest.approx(0.05)
    fake_clock.tick(0.05)
    assert takes(gate) == 0


def test_gates_of_one_name_and_folder_are_one(open_gate):
    assert [takes(open_gate(4)), takes(open_gate(4))] == [0, pytest.approx(0.25)]


def test_gates_of_other_names_or_folders_are_others(open_gate):
    assert [takes(open_gate(4)), takes(open_gate(4, "other")), takes(open_gate(4, folder="other"))] == [0, 0, 0]


def test_a_quota_is_counted_across_gates(open_gate, fake_clock):
    answers = []
    for _ in range(4):
        answers.append(takes(open_gate([10, "3/minute"])))
        fake_clock.tick(1)
    assert answers == [0, 0, 0, pytest.approx(57)]
    fake_clock.tick(56)
    assert takes(open_gate([10, "3/minute"])) == 0


def test_a_quota_of_many_calls_stays_small(open_gate, fake_clock, tmp_path):
    gate = open_gate("100000/hour", spread=False)
    for _ in range(2_000):
        takes(gate)
        fake_clock.tick(1)
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    assert path.stat().st_size < 5_000


def test_a_pause_holds_for_all_gates_of_the_name(open_gate, fake_clock):
    takes(open_gate(4), pause=30)
    assert takes(open_gate(4)) == pytest.approx(30)
    fake_clock.tick(30)
    assert takes(open_gate(4)) == 0


def test_a_new_rate_holds_at_once(open_gate, fake_clock):
    gate = open_gate("1/hour")
    takes(gate)
    gate.rates = parse_rates(10, 1)
    assert takes(gate) == pytest.approx(0.1)


def test_what_an_earlier_start_of_the_machine_left_does_not_count(open_gate, fake_clock):
    takes(open_gate(["1/hour", "1/day"]), pause=1_000)
    fake_clock.time = 5.0
    assert takes(open_gate(["1/hour", "1/day"])) == 0


def test_gates_with_other_quotas_share_pace_and_pause(open_gate, fake_clock):
    takes(open_gate("1/hour"))
    assert takes(open_gate(["1/hour", "5/day"])) > 0
    fake_clock.tick(3_600)
    takes(open_gate(["1/hour", "5/day"]), pause=50)
    assert takes(open_gate("1/hour")) == pytest.approx(50)


def test_a_folder_that_is_removed_is_made_anew(open_gate, tmp_path):
    one, other = open_gate("1/hour"), open_gate("1/hour")
    assert [takes(one) == 0, takes(other) == 0] == [True, False]
    shutil.rmtree(tmp_path / "shared")
    for each in (one, other):
        with pytest.raises(FileNotFoundError):
            takes(each)
    assert [takes(one) == 0, takes(other) == 0] == [True, False]


def test_two_spellings_of_a_folder_are_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    options = {"scope": "machine", "name": name, "max_burst": 1}
    one, other = (
        RateLimiter("1/hour", folder=folder, **options) for folder in ("shared", tmp_path / "x" / ".." / "shared")
    )
    assert [one.acquire(timeout=0), other.acquire(timeout=0)] == [True, False]


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"scope": "machine", "name": name, "max_burst": 1}
    one, other = (RateLimiter("1/hour", folder=folder, **options) for folder in ("~/limits", tmp_path / "limits"))
    assert [one.acquire(timeout=0), other.acquire(timeout=0)] == [True, False]


@contextlib.contextmanager
def locked_by_another(path):
    """Another process keeps the file locked meanwhile."""
    source = (
        f"import fcntl, sys; file = open({str(path)!r}, 'r+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            yield
        finally:
            holder.kill()


def test_a_file_whose_holder_was_stopped_keeps_nobody_from_going_on(tmp_path, name):
    limiter = RateLimiter(1_000, scope="machine", name=name, folder=tmp_path / "shared")
    limiter.acquire()
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    with locked_by_another(path), Timed() as time_taken:
        assert not limiter.acquire(timeout=0.2)
    assert time_taken.seconds < 2
    assert limiter.acquire(timeout=SECONDS)


def test_a_file_that_somebody_keeps_locked_costs_its_share_after_a_second(tmp_path, name):
    limiter = RateLimiter(1_000, scope="machine", name=name, folder=tmp_path / "shared")
    limiter.acquire()
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    with locked_by_another(path), Timed() as time_taken:
        assert [limiter.acquire() for _ in range(20)] == [True] * 20
    assert 0.9 < time_taken.seconds < 5


def test_a_pause_that_never_ends_is_no_pause_for_others(open_gate, fake_clock):
    takes(open_gate(4), pause=1e9)
    assert takes(open_gate(4)) == pytest.approx(3_600)


# From when on it is idle, when it was written, until when it is paused and claimed, by whom; of the pace and of the
# quota the name, the time (0 for a pace) and how many numbers follow: a slot and an interval; an entry.
NUMBERS = 15


@pytest.mark.parametrize("planted", [math.inf, -math.inf, math.nan, 1e300, 1e9, -1.0, 0.0])
@pytest.mark.parametrize("place", range(NUMBERS))
def test_what_cannot_be_true_stops_nobody(open_gate, fake_clock, tmp_path, place, planted):
    gate = open_gate([100, "1000/minute"])
    takes(gate)
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    numbers = array("d", path.read_bytes())
    assert len(numbers) == NUMBERS
    numbers[place] = planted
    path.write_bytes(numbers)
    fake_clock.tick(1)
    assert takes(gate) <= 3_600
    fake_clock.tick(3_600)
    assert takes(gate) == 0


@pytest.mark.parametrize(
    "written", ["text", bytes(64), b"\xff" * 64, b"x" * 2_000_000], ids=["text", "zeros", "ones", "long"]
)
@pytest.mark.parametrize("how", ["as the state", "beside it", "in place of the hash", "as a list"])
def test_what_cannot_be_true_on_a_server_stops_nobody(redis_backend, name, how, written):
    limiter = RateLimiter([100, "1000/hour"], scope="redis", name=name, url=url_of(redis_backend))
    limiter.acquire()
    with redis_backend.client() as client:
        if how in {"as the state", "beside it"}:
            assert client.hset(key_of(name), "state" if how == "as the state" else "paused", written) in {0, 1}
        else:
            client.delete(key_of(name))
            (client.rpush if how == "as a list" else client.set)(key_of(name), written)
    assert limiter.acquire(timeout=SECONDS)


def test_a_cost_that_turned_out_to_be_more_than_the_whole_limit_is_remembered(open_gate, fake_clock):
    make = lambda: open_gate({"tokens": "100/hour"}, spread=False)  # noqa: E731
    assert make().ask(10.0) == 0
    make().act(lambda ledger, now: ledger.take(now, (490.0,)))
    assert make().ask(1.0) > 0
    fake_clock.tick(3_600)
    assert make().ask(1.0) == 0


def test_costs_are_shared(world, scope, name):
    options = {"rate_limit": {"calls": 1_000, "tokens": "100/hour"}, "rate_limit_options": {**scope, "name": name}}
    decorate = opero.opero(rate_limit_cost={"tokens": (len, lambda _: 40)}, retries=0, total_timeout=2, **options)
    f, g = (decorate(world.define(lambda text: text)) for _ in range(2))
    slow = {"rate_limit_options": {**scope, "name": name, "spread": False}}
    f, g = (opero.control(each).with_options(**slow) for each in (f, g))
    world.run(f, "x" * 60)  # 40 in the end
    world.run(g, "x" * 60)
    with pytest.raises(CallTimeoutError):
        world.run(f, "x" * 60)


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_of_the_file_raises_nothing_and_ends(open_gate, tmp_path, seed):
    gate = open_gate([4, "5/day"])
    takes(gate)
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    generator = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(generator.randrange(1, 9)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    path.write_bytes(data[: generator.randrange(len(data) + 1)])
    assert takes(gate) <= 366 * 86_400


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 500, bytes(500)])
def test_a_damaged_file_limits_anew(open_gate, tmp_path, damage):
    takes(open_gate([4, "5/day"]))
    for path in (tmp_path / "shared" / "limits").iterdir():
        path.write_bytes(damage)
    answers = [takes(open_gate([4, "5/day"])) for _ in range(2)]
    assert max(answers) > 0


def test_a_file_that_is_removed_limits_anew(open_gate, tmp_path):
    gate = open_gate("1/hour")
    takes(gate)
    for path in (tmp_path / "shared" / "limits").iterdir():
        path.unlink()
    assert [takes(gate) == 0, takes(gate) > 0] == [True, True]


@thoroughly
@given(
    st.sampled_from([(10, 1), (2, 3), (0.5, 5)]),
    st.lists(st.sampled_from(["3/minute", "20/minute", "30/hour"]), max_size=2),
    st.lists(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0, 20.0, 59.0, 600.0]), max_size=60),
)
def test_no_window_of_a_gate_has_too_many_starts(open_gate, fake_clock, pace_and_burst, quotas, gaps):
    pace, burst = pace_and_burst
    name, starts = os.urandom(8).hex(), []
    for gap in gaps:
        fake_clock.tick(gap)
        if takes(open_gate([pace, *quotas], name, max_burst=burst)) == 0:
            starts.append(fake_clock.now())
    assert worst_excess(starts, pace, burst) <= 1e-6 if starts else not gaps
    for _, units, seconds in parse_rates([pace, *quotas]).quotas:
        for first, later in zip(starts, starts[units:], strict=False):
            assert later - first >= seconds - 1e-6


@thoroughly
@given(st.sampled_from([[10], [2, "3/minute"], ["30/hour", "20/minute"]]), st.integers(1, 5), st.integers(1, 30))
def test_who_waits_as_long_as_a_gate_says_gets_the_slot(open_gate, fake_clock, rate, burst, count):
    gate = open_gate(rate, os.urandom(8).hex(), max_burst=burst)
    for _ in range(count):
        fake_clock.tick(takes(gate) + 1e-6)
    assert takes(gate) == 0 or count


def test_files_of_idle_limits_are_removed_and_others_kept(open_gate, fake_clock, tmp_path):
    takes(open_gate(["1/hour", "5/day"], "busy"))
    for number in range(100):
        takes(open_gate(100, f"value {number}"))
        fake_clock.tick(1)
    assert len(list((tmp_path / "shared" / "limits").iterdir())) <= 12
    assert takes(open_gate(["1/hour", "5/day"], "busy")) > 0


# Between processes


class Process:
    """What one process asks of a gate, as its line does."""

    def __init__(self, asker, name, amount=1.0):
        self.asker, self.name, self.amount = asker, name, amount
        self.refusals, self.asks_at = 0, 0.0

    def asks(self, now):
        if now < self.asks_at:
            return False
        wait = self.asker.ask(self.amount, who=self.name, claims=self.refusals >= 3)
        self.refusals = self.refusals + 1 if wait else 0
        self.asks_at = now + wait
        return not wait


def test_a_process_that_others_forestall_gets_its_turn(open_gate, fake_clock):
    quick, slow = (Process(open_gate(10), name) for name in (1.0, 2.0))
    got = []
    for _ in range(200):
        fake_clock.tick(0.01)
        got += [process.name for process in (quick, slow) if process.asks(fake_clock.now())]
    assert 15 <= len(got) <= 21
    assert 4 <= got.count(2.0) <= 16


def test_a_dear_call_is_not_passed_for_ever_by_cheap_ones_of_another_process(open_gate, fake_clock):
    cheap, dear = (
        Process(open_gate({"tokens": "100/minute"}, spread=False), name, amount)
        for name, amount in [(1.0, 1.0), (2.0, 60.0)]
    )
    for _ in range(600):
        fake_clock.tick(1)
        cheap.asks(fake_clock.now())
        if dear.asks(fake_clock.now()):
            break
    assert dear.refusals == 0
    assert fake_clock.now() < 1_000 + 5 * 60


def test_a_process_that_ends_with_the_next_slot_claimed_holds_up_the_others_for_a_second(open_gate, fake_clock):
    gate = open_gate("1/hour")
    takes(gate)
    assert gate.ask(who=1.0, claims=True) == 1
    fake_clock.tick(3_600 - 0.5)
    assert gate.ask(who=1.0, claims=True) == pytest.approx(0.5)
    assert gate.ask(who=2.0) == pytest.approx(0.52)
    fake_clock.tick(0.52)
    assert takes(gate) == 0


def test_lines_claim_slots_that_others_were_faster_to_take(open_gate, fake_clock, tmp_path):
    limiter = RateLimiter("1/minute", scope="machine", name="limit", folder=tmp_path / "shared", max_burst=1)
    other = open_gate("1/minute")
    turn = Turn([(limiter.limit, (1.0,))])

    def looks():
        while turn.poll() and turn.news != "taken":
            assert list(turn.ask()) == []

    for seconds in (60, 1):
        assert takes(other) == 0
        looks()
        fake_clock.tick(seconds)
    # The claim has to be kept up.
    for _ in range(70):
        assert takes(other) > 0
        looks()
        fake_clock.tick(turn.due_in())
    assert turn.news == "taken"


def test_a_server_keeps_what_was_taken_claimed_and_paused(redis_backend, name):
    asker, other = (Asker(RedisGate(name, url_of(redis_backend)), parse_rates("1/hour", 1)) for _ in range(2))
    assert [asker.ask(), asker.ask(who=1.0, claims=True)] == [0, 1]
    assert other.ask(who=2.0) == pytest.approx(3_600, abs=5)
    takes(other, pause=3_600)
    assert asker.act(lambda ledger, now: ledger.claimed_until - now) == pytest.approx(1, abs=0.9)
    assert asker.act(lambda ledger, now: ledger.paused_until - now) == pytest.approx(3_600, abs=5)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_shared_limits_no_slot_is_taken_before_both_have_one(tmp_path, fake_clock, order):
    options = {"scope": "machine", "folder": tmp_path / "shared", "max_burst": 1}
    fast, elsewhere, slow = (
        RateLimiter(rate, name=name, **options) for rate, name in [(10, "fast"), (10, "fast"), ("1/minute", "slow")]
    )
    slow.acquire()
    waiting = Turn([(fast.limit, (1.0,)), (slow.limit, (1.0,))][::order]).wait()
    fake_clock.tick(0.1)
    arrival = waiting.send(None)
    for _ in range(5):
        assert elsewhere.acquire(timeout=0)
        fake_clock.tick(1)
        assert not arrival.poll()
    fake_clock.tick(55)
    assert arrival.poll()
    assert elsewhere.acquire(timeout=0)
    arrival = waiting.send(None)
    fake_clock.tick(0.1)
    assert arrival.poll()
    with pytest.raises(StopIteration) as end:
        waiting.send(None)
    assert end.value.value
    assert not elsewhere.acquire(timeout=0)


def test_a_folder_that_others_can_write_to_is_refused(world, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    f = limited(world.define(lambda: None), rate_limit=5, rate_limit_options={"scope": "machine", "folder": folder})
    with pytest.raises(UnsafeCacheError, match="folder"):
        world.run(f)


def test_the_files_are_private(world, tmp_path):
    folder = tmp_path / "shared"
    world.run(
        limited(world.define(lambda: None), rate_limit=5, rate_limit_options={"scope": "machine", "folder": folder})
    )
    for path in [folder, *folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


def test_the_limit_lies_in_the_users_cache_folder_by_default(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world.run(limited(world.define(lambda: None), rate_limit=5, rate_limit_options={"scope": "machine"}))
    assert len(list((tmp_path / "opero" / "limits").iterdir())) == 1


# Callers of one process


def test_functions_of_one_name_share_a_limit(world, scope, name):
    decorate = opero.opero(rate_limit="1/hour", rate_limit_options={**scope, "name": name}, retries=0, total_timeout=5)
    world.run(decorate(world.define(lambda: "f")))
    with pytest.raises(CallTimeoutError):
        world.run(decorate(world.define(lambda: "g")))


def test_functions_without_a_name_have_limits_of_their_own(world, scope):
    def make(answer):
        options = {**scope, "max_burst": 1}
        return limited(world.define(lambda: answer), rate_limit="1/hour", rate_limit_options=options, total_timeout=5)

    f, g = make("f"), make("g")
    assert [world.run(f), world.run(g)] == ["f", "g"]
    with pytest.raises(CallTimeoutError):
        world.run(make("f"))


def test_a_function_that_cannot_be_told_apart_needs_a_name(world, scope):
    lock = threading.Lock()
    with pytest.raises(MisuseError, match="'name'"):
        limited(world.define(lambda: lock), rate_limit=5, rate_limit_options=scope)


def test_threads_tasks_and_loops_share_the_limit(scope, name):
    limiter = RateLimiter(LIMITED, max_burst=1, name=name, **scope)

    def blocking():
        for _ in range(4):
            limiter.acquire()

    async def main():
        await asyncio.gather(*[limiter.acquire_async() for _ in range(4)])

    with Timed() as time_taken:
        results([*[started(blocking) for _ in range(2)], *[started(asyncio.run, main()) for _ in range(2)]])
    assert time_taken.is_enough_for(16)


def test_a_map_is_limited(mode, scope, name):
    options = {**scope, "name": name, "max_burst": 1}
    mapped = opero.opmap(rate_limit=LIMITED, rate_limit_options=options, **mode.options)(mode.define(abs))
    with Timed() as time_taken:
        assert mode.run(mapped, range(12)) == list(range(12))
    assert time_taken.is_enough_for(12)


def test_tasks_start_in_the_order_of_asking(scope, name):
    limiter = RateLimiter(50, max_burst=1, name=name, **scope)
    limiter.acquire()
    assert order_of_tasks(limiter, 20) == list(range(20))


def test_slow_limits_serve_threads_in_the_order_of_asking(scope, name):
    limiter = RateLimiter(10, max_burst=1, name=name, **scope)
    limiter.acquire()
    order, waiting = [], []
    for number in range(6):
        waiting.append(started(lambda number=number: limiter.acquire() and order.append(number)))
        until(lambda number=number: len(limiter.limit.waiting) == number + 1 or order)
    results(waiting)
    assert order == list(range(6))


def test_a_new_rate_reaches_those_who_wait(scope, name):
    limiter = RateLimiter("1/hour", max_burst=1, name=name, **scope)
    limiter.acquire()
    waiting = started(limiter.acquire)
    until(lambda: limiter.limit.expected_wait() > 3_000)
    limiter.rate = 1_000
    assert waiting.result(SECONDS)


def test_a_cancelled_waiter_lets_the_next_one_go_on(scope, name):
    limiter = RateLimiter("1/hour", max_burst=1, name=name, **scope)

    async def main():
        await limiter.acquire_async()
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks[:4]:
            task.cancel()
        await asyncio.gather(*tasks[:4], return_exceptions=True)
        limiter.rate = 1_000
        tasks.append(asyncio.create_task(limiter.acquire_async()))
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*tasks[4:])
        assert not limiter.limit.waiting

    asyncio.run(main())


def test_each_value_has_a_limit_of_its_own_and_is_not_to_be_read_anywhere(world, scope, name, tmp_path, request):
    options = {**scope, "name": name, "max_burst": 1}
    f = limited(
        world.define(lambda key: key),
        rate_limit="1/hour",
        per="key",
        rate_limit_options=options,
        total_timeout=5,
    )
    assert [world.run(f, "secret-key-1"), world.run(f, "secret-key-2")] == ["secret-key-1", "secret-key-2"]
    with pytest.raises(CallTimeoutError):
        world.run(f, "secret-key-1")
    stored = [str(path).encode() for path in tmp_path.rglob("*")]
    stored += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    if scope["scope"] == "redis":
        stored = request.getfixturevalue("redis_backend").stored()
    assert stored
    assert not any(b"secret-key" in part for part in stored)


def test_a_candidate_with_a_free_slot_is_tried_first(world, scope, name):
    options = {**scope, "name": name, "max_burst": 1, "when_full": "next"}
    f = limited(
        world.define(lambda x, key: key),
        arg_fallback="key",
        rate_limit="1/hour",
        per="key",
        rate_limit_options=options,
    )
    assert [world.run(f, x, ["a", "b", "c"]) for x in range(3)] == ["a", "b", "c"]


def test_a_candidate_whose_slots_others_have_taken_gives_way_to_one_with_a_free_slot(world, scope, name):
    options = {"rate_limit_options": {**scope, "name": name, "max_burst": 1, "when_full": "next"}}
    options |= {"arg_fallback": "key", "per": "key", "rate_limit": "1/hour", "total_timeout": 60}
    of_another_process, f = (limited(world.define(lambda key: key), **options) for _ in range(2))
    assert world.run(of_another_process, ["a"]) == "a"
    assert [world.run(f, ["a", "b", "c"]) for _ in range(2)] == ["b", "c"]


def test_who_is_refused_since_others_were_faster_is_told_when_the_next_slot_comes(scope, name):
    options = {"max_burst": 1, "name": name, **scope}
    RateLimiter("1/hour", **options).acquire()
    limiter = RateLimiter("1/hour", when_full="raise", **options)
    with pytest.raises(opero.RateLimitedError) as caught:
        limiter.acquire()
    assert caught.value.retry_in == pytest.approx(3_600, abs=10)


def test_who_was_refused_gets_what_others_give_back(scope, name):
    options = {"spread": False, "name": name, **scope}
    one, other = (RateLimiter({"tokens": "100/hour"}, **options) for _ in range(2))
    assert [one.acquire(tokens=90, timeout=0), other.acquire(tokens=50, timeout=0)] == [True, False]
    drive(one.limit.correct((-80.0,), 0.0), None)
    assert other.acquire(tokens=50, timeout=0)


def test_who_waits_looks_again_once_all_can_hear_what_was_given_back(scope, name):
    options = {"spread": False, "name": name, **scope}
    one, other = (RateLimiter({"tokens": "100/hour"}, **options) for _ in range(2))
    one.acquire(tokens=90)
    turn, found = Turn([(one.limit, (50.0,))]), []
    turn.notify(lambda: found.append(other.acquire(tokens=50, timeout=0)))
    assert not turn.poll()
    drive(one.limit.correct((-80.0,), 0.0), None)
    turn.leave()
    assert found == [True]


def test_who_waits_for_a_distant_slot_notices_within_a_second_that_another_process_gives_back(scope, name):
    options = {"spread": False, "name": name, **scope}
    one, other = (RateLimiter({"tokens": "100/hour"}, **options) for _ in range(2))
    one.acquire(tokens=90)
    waiting = started(lambda: other.acquire(tokens=50))
    until(lambda: other.limit.expected_wait() > 3_000)
    drive(one.limit.correct((-80.0,), 0.0), None)
    assert waiting.result(SECONDS)


def test_seconds_from_retry_on_hold_for_everybody(world, scope, name):
    def function(x):
        if x == 1:
            raise ValueError
        return x

    options = {"rate_limit": 1_000, "rate_limit_options": {**scope, "name": name}}
    f = opero.opero(retry_on=lambda _: 30, retries=1, total_timeout=10, **options)(world.define(function))
    other = limited(world.define(lambda: None), total_timeout=10, **options)
    with pytest.raises(ValueError):  # noqa: PT011 - the function's own
        world.run(f, 1)
    with pytest.raises(CallTimeoutError):
        world.run(other)


def test_a_wait_that_would_pass_total_timeout_fails_at_once(world, scope, name):
    options = {**scope, "name": name, "max_burst": 1}
    f = limited(world.define(lambda: None), rate_limit="1/hour", rate_limit_options=options, total_timeout=60)
    world.run(f)
    with Timed() as time_taken, pytest.raises(CallTimeoutError):
        world.run(f)
    assert time_taken.seconds < 5


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_shares_the_limit_and_waits_for_nobody_of_its_parent(scope, name):
    limiter = RateLimiter(LIMITED, max_burst=1, name=name, **scope)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            limiter.acquire()

    threads = [started(busy) for _ in range(4)]
    try:
        with Timed() as time_taken:
            answers = [forked(lambda: [limiter.acquire() for _ in range(3)]) for _ in range(5)]
    finally:
        stop.set()
    results(threads)
    assert answers == ["[True, True, True]"] * 5
    assert time_taken.is_enough_for(15)


def test_a_limiter_travels_to_other_processes_as_the_same_limit(scope, name):
    limiter = RateLimiter("1/hour", max_burst=1, name=name, **scope)
    limiter.acquire()
    assert not pickle.loads(pickle.dumps(limiter)).acquire(timeout=1)


# Processes that know nothing of each other


def test_processes_share_one_limit_and_all_get_slots(scope, name, start, journal):
    source = """
        from opero.core import RateLimiter
        options = SETTINGS
        limiter = RateLimiter(options.pop("rate"), **options)
        say("ready")
        told()
        end = time.monotonic() + 1.5
        count = 0
        while time.monotonic() < end:
            limiter.acquire()
            count += 1
            note(time.monotonic())
        say(count)
    """
    programs = [start(source.replace("SETTINGS", repr({"rate": 100, "name": name, **scope})), {}) for _ in range(4)]
    assert [program.heard() for program in programs] == ["ready"] * 4
    for program in programs:
        program.tell("go")
    counts = [program.heard() for program in programs]
    for program in programs:
        program.end()
    starts = sorted(map(float, journal.lines()))
    assert sum(counts) == len(starts)
    assert worst_excess(starts, 100, 5) <= 100 * LATE
    assert min(counts) > 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.soak
def test_holders_and_waiters_that_are_killed_stop_nobody_and_the_limit_holds(scope, name, journal):
    limiter = RateLimiter(1_000, name=name, **scope)
    limiter.acquire()

    def child():
        while True:
            limiter.acquire()
            journal.add(time.monotonic())

    def fork():
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(1)
        return pid

    def kill(pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    generator = random.Random(0)
    children = [fork() for _ in range(4)]
    try:
        for _ in range(100):
            time.sleep(generator.random() * 0.03)
            place = generator.randrange(4)
            kill(children[place])
            children[place] = fork()
        before = len(journal.lines())
        until(lambda: len(journal.lines()) > before + 1_000)
    finally:
        for pid in children:
            kill(pid)
    starts = sorted(map(float, journal.lines()))
    assert worst_excess(starts, 1_000, 10) <= 1_000 * LATE


# What fails costs the sharing, and not the call


def test_without_its_folder_each_process_goes_on_with_a_limit_of_its_own(world, tmp_path, warnings):
    (tmp_path / "file").write_text("in the way")
    options = {"scope": "machine", "folder": tmp_path / "file" / "folder", "max_burst": 1}
    f = limited(world.define(lambda: None), rate_limit=LIMITED, rate_limit_options=options)
    with Timed() as time_taken:
        for _ in range(6):
            world.run(f)
    assert time_taken.is_enough_for(6)
    assert len(warnings) == 1


def test_without_a_server_each_process_goes_on_with_a_limit_of_its_own(world, own_redis, warnings):
    url = url_of(own_redis)
    own_redis.server.stop()
    f = limited(
        world.define(lambda: None),
        rate_limit=LIMITED,
        rate_limit_options={"scope": "redis", "url": url, "max_burst": 1},
    )
    with Timed() as time_taken:
        for _ in range(6):
            world.run(f)
    assert time_taken.is_enough_for(6)
    assert len(warnings) == 1
    assert "redis" in warnings[0]


def test_a_server_that_comes_back_is_used_again(own_redis, name, monkeypatch):
    monkeypatch.setattr(faults, "REST_SECONDS", 0.1)
    limiter = RateLimiter(1_000, scope="redis", url=url_of(own_redis), name=name)
    limiter.acquire()
    own_redis.server.stop()
    assert limiter.acquire(timeout=SECONDS)
    own_redis.server.start()

    def is_used():
        limiter.acquire()
        return own_redis.stored()

    until(is_used)


def test_a_frozen_server_costs_two_seconds_once(own_redis, name):
    limiter = RateLimiter(1_000, scope="redis", url=url_of(own_redis), name=name)
    limiter.acquire()
    own_redis.server.freeze()
    with Timed() as time_taken:
        for _ in range(20):
            assert limiter.acquire(timeout=SECONDS)
    own_redis.server.thaw()
    assert time_taken.seconds < 3


def test_a_frozen_server_does_not_block_the_event_loop(own_redis, name):
    limiter = RateLimiter(1_000, scope="redis", url=url_of(own_redis), name=name)
    turns = []

    async def main():
        await limiter.acquire_async()
        own_redis.server.freeze()
        ticker = asyncio.create_task(note_turns(turns))
        await limiter.acquire_async()
        ticker.cancel()

    try:
        asyncio.run(main())
        assert len(turns) > 20
    finally:
        own_redis.server.thaw()


def test_a_server_that_forgets_its_scripts_is_asked_again(own_redis, name):
    limiter = RateLimiter(1_000, scope="redis", url=url_of(own_redis), name=name)
    limiter.acquire()
    with own_redis.client() as client:
        client.script_flush()
        client.flushall()
    limiter.acquire()
    assert own_redis.stored()


def test_what_is_stored_on_the_server_ends_by_itself(redis_backend, name):
    url = f"redis://{redis_backend.server.host}:{redis_backend.server.port}"
    RateLimiter([10, "5/minute"], scope="redis", url=url, name=name).acquire()
    with redis_backend.client() as client:
        keys = list(client.scan_iter(f"*{name}*"))
        assert [0 < client.ttl(key) < 100 for key in keys] == [True]


def test_each_of_many_values_costs_as_much_as_one_of_few(tmp_path, name):
    limiter = RateLimiter([1_000, "5/day"], scope="machine", name=name, folder=tmp_path / "shared")
    looked_at = []

    def take_slots(values):
        for value in values:
            drive(Turn([(limiter.per_value.of(f"value {value}"), ONE)]).wait(), None)

    def note(event, _frame, _arg):
        looked_at.append(event)

    def events_of(values):
        looked_at.clear()
        sys.setprofile(lambda frame, event, arg: note(event, frame, arg))
        try:
            take_slots(values)
        finally:
            sys.setprofile(None)
        return len(looked_at)

    take_slots(range(10))
    few = events_of(range(10, 30))
    take_slots(range(30, 600))
    assert events_of(range(600, 620)) < 1.5 * few


def count_of_lines():
    gc.collect()
    return sum(isinstance(found, Line) for found in gc.get_objects())


def test_what_the_file_knows_of_values_is_not_kept_besides(world, tmp_path, name):
    options = {"scope": "machine", "name": name, "folder": tmp_path}
    f = limited(world.define(lambda key: key), rate_limit="5/day", per="key", rate_limit_options=options)
    before = count_of_lines()
    for key in range(200):
        world.run(f, key)
    assert count_of_lines() - before < 20


def test_values_are_kept_where_the_file_cannot_be_written(world, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    options = {"scope": "machine", "name": name, "folder": tmp_path / "file" / "folder", "when_full": "raise"}
    f = limited(world.define(lambda key: key), rate_limit="5/day", per="key", rate_limit_options=options)
    for key in range(50):
        world.run(f, key)
    for key in range(50):
        with pytest.raises(opero.RateLimitedError):
            world.run(f, key)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path, name):
    options = {"scope": "machine", "name": name, "folder": tmp_path / "shared"}
    RateLimiter(5, **options).acquire()
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    os.chown(path, 12_345, 12_345)
    with pytest.raises(UnsafeCacheError, match="another user"):
        RateLimiter(5, **options).acquire()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no such rights")
def test_a_file_that_others_can_write_to_is_refused(tmp_path, name):
    options = {"scope": "machine", "name": name, "folder": tmp_path / "shared"}
    RateLimiter(5, **options).acquire()
    (path,) = (tmp_path / "shared" / "limits").iterdir()
    path.chmod(0o666)
    with pytest.raises(UnsafeCacheError, match="can be written to by others"):
        RateLimiter(5, **options).acquire()
