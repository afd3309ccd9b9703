"""together.py: the processes of one run live and end together. setup() starts the watch, @entry ends it.

A process that fails tells the others; one that is gone, with its machine, is missed; either way all leave within a
minute with a sentence, and the same command goes on from the last saved state. Ideas of the model are elsewhere.
"""
import contextlib
import itertools
import os
import sys
import threading
import time

import torch.distributed as dist


def leave_group(code):
    """End a process of several at once: all is written by now, and gloo's threads can abort the interpreter's own
    farewell ("terminate called without an active exception", about one exit in ten with torch 2.13)."""
    for thread in threading.enumerate():
        if thread.name.startswith("saving"):  # core.run's, a state half-written: it ends by itself
            thread.join()
    if dist.is_initialized():
        with contextlib.suppress(dist.DistError):
            dist.distributed_c10d._get_default_store().set(*("failed", "1") if code in (1, 2) else (heart(), "left"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def heart(ahead=0):
    """The name under which a process, counted from this one on, says that it is alive."""
    return f"alive {(dist.get_rank() + ahead) % dist.get_world_size()}"


def give_up():
    print("error: another process of this run failed or cannot be reached; the same command goes on from the last "
          "saved state", file=sys.stderr)
    leave_group(1)


def stay_together(every=5, patience=40):
    """Give up when another process has failed, or has not been heard of for `patience` seconds, as when its machine is
    gone: a collective would wait for hours. Each process watches the next one; what one sees is told to all."""
    store, last, since = dist.distributed_c10d._get_default_store().clone(), None, time.monotonic()
    for count in itertools.count():
        with contextlib.suppress(dist.DistError):  # of the store itself: then nothing is heard either
            store.set(heart(), str(count))
            beat = store.get(heart(1)) if store.check([heart(1)]) else last
            if beat != last or beat == b"left":
                last, since = beat, time.monotonic()
            if store.check(["failed"]):
                since = -patience
        if time.monotonic() - since > patience:
            give_up()
        time.sleep(every)
