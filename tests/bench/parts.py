"""Misbehaving parts of `bench gpu`, for its tests: each yields one good row, and then behaves as its name says."""

import os
import signal
import time


def run(context):
    yield {"case": "first", "correct": True}
    yield from BEHAVIOURS[context.settings.part](context)


def summarise(rows):
    return [f"{len(rows)} rows"]


def good(context):
    yield {"case": "second", "correct": True}


def raises(context):
    yield {"case": "second"}
    raise ValueError("a part that raises\nin two lines")


def crashes(context):
    os.kill(os.getpid(), signal.SIGSEGV)
    yield {}


def hangs(context):
    if os.fork() == 0:  # a child process is killed with its part
        time.sleep(1000)
    time.sleep(1000)
    yield {}


BEHAVIOURS = {"good": good, "raises": raises, "crashes": crashes, "hangs": hangs, "again": good}
