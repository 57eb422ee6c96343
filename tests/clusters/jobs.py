"""What the tests let clusters do; the workers import it by its name."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from pathlib import Path


def note(path, text):
    """Add a line to a file that all processes share."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def noted(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def double(item):
    return item * 2


async def double_later(item):
    await asyncio.sleep(0)
    return item * 2


def pid(_item, seconds=0.0):
    time.sleep(seconds)
    return os.getpid()


def noted_nap(item, path, seconds):
    note(path, f"{item} {os.getpid()}")
    time.sleep(seconds)
    return item


async def noted_nap_async(item, path, seconds):
    note(path, f"{item} {os.getpid()}")
    await asyncio.sleep(seconds)
    return item


def noted_time(item, path):
    note(path, time.monotonic())
    return item


def fail_twice(item, path):
    note(path, item)
    if noted(path).count(str(item)) < 3:
        raise ConnectionError(item)
    return item


def fail_once_if_odd(item, path):
    note(path, item)
    if item % 2 and noted(path).count(str(item)) < 2:
        raise ConnectionError(item)
    return item


def kill_if_three(item, path):
    note(path, item)
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    return item


def nap_and_kill_if_three(item, path):
    time.sleep(0.05)
    return kill_if_three(item, path)


def sleep_if_one(item):
    if item == 1:
        time.sleep(600)
    return item


def compute_if_one(item):
    """Never lets another thread run."""
    return bool(re.match(r"(a+)+$", "a" * 60 + "b")) if item == 1 else item


async def wait_if_one(item):
    if item == 1:
        await asyncio.sleep(600)
    return item


class TwoArgumentsError(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code


def fail_with_two(item):
    raise TwoArgumentsError(item, "no")


def lock_if_one(item):
    return threading.Lock() if item == 1 else item


def lengths(items):
    return [len(item) for item in items]


class Large:
    """An argument that tells where it is unpickled."""

    def __init__(self, path, size):
        self.path = path
        self.content = b"x" * size

    def __setstate__(self, state):
        self.__dict__.update(state)
        note(self.path, f"unpickled {os.getpid()}")


def size_of(_item, large):
    time.sleep(0.02)
    return len(large.content), os.getpid()
