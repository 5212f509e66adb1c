"""The plan of a run for devices that nobody has here: bytes and operations on each, and what brings it under a limit."""
import os
from collections.abc import Callable, Iterator

import jax
import rich.console
import rich.table

from rl_jax.experiment import Experiment
from rl_jax.train import advice, footprint, session
from rl_jax.train.footprint import Footprint
from rl_jax.train.plan import GIB

UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}
COUNT = "--xla_force_host_platform_device_count"


def pretend(devices: int) -> None:
    """Makes this process one of so many CPU devices; nothing may have run in it yet."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(COUNT)]
    # what is compiled is never run
    os.environ["XLA_FLAGS"] = " ".join([*others, "--xla_backend_optimization_level=0"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def show(experiment: Experiment, limit_gib: int | float, console: rich.console.Console) -> bool:
    """Prints the plan; returns whether it fits, or can be made to.

    Args:
      limit_gib: per device; 0 asks for no advice.
    """
    pretend(footprint.devices(experiment) + (max(advice.MORE_DEVICES) - 1) * experiment.mesh.devices)
    most = 0
    for index, name in enumerate(session.phase_names(experiment)):
        found = footprint.footprint(experiment, index)
        most = max(most, found.total)
        console.print(bytes_table(found, f"{name}: bytes on each of {_devices(experiment)}"))
        console.print(flops_table(found, f"{name}: operations of a step on each"))
    if experiment.shape.compute == "bfloat16":
        console.print("The plan is a CPU's, which multiplies no bfloat16: its temporaries hold float32 copies of what the "
                      "network computes in bfloat16. Accelerators do without them, so this is more than they need.")
    return limit_gib <= 0 or advised(experiment, most, limit_gib, console)


def advised(experiment: Experiment, most: int, limit_gib: int | float, console: rich.console.Console,
            needed: Callable[[Experiment], int] = footprint.needed) -> bool:
    """Prints what brings a run under the limit; returns whether anything does.

    Args:
      most: bytes per device that it needs as it is.
      limit_gib: per device.
      needed: experiment -> bytes per device.
    """
    limit = limit_gib * GIB
    if most <= limit:
        console.print(f"It needs {most / GIB:.4g} GiB, and {limit_gib:.4g} GiB are allowed: it fits.")
        return True
    tried = advice.advise(experiment, limit, needed)
    console.print(advice_table(tried, limit, f"{most / GIB:.4g} GiB are needed and {limit_gib:.4g} GiB allowed"))
    fits = any(one.bytes <= limit for one in tried)
    if not fits:
        least = min((one.bytes for one in tried), default=most)
        console.print(f"Nothing that was tried brings it under {limit_gib:.4g} GiB: the least is {least / GIB:.4g} GiB. Take "
                      "fewer prompts per step, shorter answers, a smaller network, or more devices.")
    return fits


def _devices(experiment: Experiment) -> str:
    sizes = vars(experiment.mesh)
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "offload" and size > 1)
    return f"{experiment.mesh.devices} devices ({axes})" if axes else "1 device"


def bytes_table(found: Footprint, title: str) -> rich.table.Table:
    """By role; what is drawn with and what is learned with are there one after the other."""
    unit = next((name for name, size in UNITS.items() if found.total >= size), "KiB")
    shown = rich.table.Table(title=title, title_justify="left")
    shown.add_column("role")
    shown.add_column(unit, justify="right")
    for when, name, size in _lines(found):
        shown.add_row(f"{when}{name}", f"{size / UNITS[unit]:,.3f}", end_section=name in ("sum", "other temporaries"))
    shown.add_row("all, at the dearest moment", f"{found.total / UNITS[unit]:,.3f}")
    return shown


def _lines(found: Footprint) -> Iterator[tuple[str, str, int]]:
    for when, part in ("held: ", found.held), ("in host memory: ", found.away), ("while drawing: ", found.rollout), ("while learning: ", found.update):
        for name, size in part.items():
            yield when, name, size
        if part:
            yield when, "sum", sum(part.values())
    yield "", "other temporaries", found.rest


def flops_table(found: Footprint, title: str) -> rich.table.Table:
    """By part of the step."""
    shown = rich.table.Table(title=title, title_justify="left")
    shown.add_column("part of the step")
    shown.add_column("GFLOP", justify="right")
    for name, count in (*found.flops.items(), ("sum", sum(found.flops.values()))):
        shown.add_row(name, f"{count / 1e9:,.6g}")
    return shown


def advice_table(tried: list[advice.Tried], limit: int | float, title: str) -> rich.table.Table:
    """What was turned, and what a run would then need."""
    shown = rich.table.Table(title=title, title_justify="left")
    shown.add_column("with", overflow="fold")
    shown.add_column("devices", justify="right")
    shown.add_column("GiB on each", justify="right")
    shown.add_column("fits")
    for one in tried:
        shown.add_row(one.command, str(footprint.devices(one.experiment)), f"{one.bytes / GIB:,.4g}",
                      "yes" if one.bytes <= limit else "no")
    return shown
