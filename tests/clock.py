"""What benchmarks are tested with: a clock that calls every side once, and the numbers of a table's cells."""
import time


def clock(*sides):
    """Seconds of one call of each side."""
    spent = []
    for side in sides:
        began = time.perf_counter()
        side()
        spent.append(time.perf_counter() - began)
    return spent


def number(cell):
    return float(cell.rstrip("x%").replace(",", ""))
