"""Parts of `bench gpu` that misbehave, for its tests: each name of PARTS is a module of rows after one good row."""

import os
import signal
import time


def rows(context):
    yield {"case": "first", "correct": True}
    yield from BEHAVIOURS[context.settings.part](context)


def summary(rows):
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
    if os.fork() == 0:  # what a part starts is ended with it
        time.sleep(1000)
    time.sleep(1000)
    yield {}


BEHAVIOURS = {"good": good, "raises": raises, "crashes": crashes, "hangs": hangs, "again": good}
