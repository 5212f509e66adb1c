"""Verifiers with every fault that `test_worker.py` asks about; the text says what to do."""
import os
import signal
import sys
import threading
import time

import numpy as np


def behave(fields, text):
    if text == "raise":
        raise RuntimeError("broken")
    if text == "hang":
        time.sleep(60)
    if text == "spin":
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass
    if text == "deaf":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "exit quietly":
        os._exit(0)
    if text == "quit":
        sys.exit(0)
    if text == "abort":
        os.kill(os.getpid(), signal.SIGSEGV)
    special = {"nan": float("nan"), "inf": float("inf"), "huge": 1e300, "text": "1", "none": None, "bool": np.True_,
               "integer": np.int64(1)}
    if text == "nothing":
        return None
    if text == "no part":
        return {"score": 1.0}
    return {"score": special.get(text, float(text == fields.get("answer"))), "length": len(text)}


def surroundings(fields, text):
    return {"score": float("jax" in sys.modules),
            "main_thread": float(threading.current_thread() is threading.main_thread())}


def slow(fields, text):
    time.sleep(0.02)
    return {"score": 1.0}


def math_verify_default(fields, text):
    """math-verify with its own limits, which use signal.alarm."""
    import math_verify

    return {"score": float(math_verify.verify(math_verify.parse(fields["answer"]), math_verify.parse(text)))}
