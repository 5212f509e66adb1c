"""Host verifiers with one fault each: answers that begin with a digit meet it, the others score 0 or 1."""
import time


def score(fault, fields, text):
    """The fault's own doing, or whether the answer's first symbol is "+"."""
    if text[:1].isdigit():
        if fault == "raises":
            raise RuntimeError("broken")
        if fault == "hangs":
            time.sleep(60)
        return {"score": float("nan")}
    return {"score": float(text[:1] == "+")}


def always_raises(fields, text):
    """Fails, whatever the answer."""
    raise RuntimeError("broken")


def even(fields, text):
    """About every other answer is right, and which depends on the question."""
    return {"score": float(sum(map(ord, fields["question"] + text)) % 2 == 0)}
