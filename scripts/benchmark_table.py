"""Tables of measurements: on the screen, and in BENCHMARKS.md."""
import dataclasses
import os
import pathlib
import platform
import re
import time

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "BENCHMARKS.md"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first `words` columns are words, the others numbers.

    `missed` names the rows that do not reach their target.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    missed: tuple[str, ...] = ()


def circumstances() -> str:
    """Device, versions and date."""
    import jax

    device = jax.devices()[0]
    kind = f"{os.cpu_count()} cores of a {platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
    return f"{kind}, Python {platform.python_version()}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"


def show(table: Table) -> None:
    """Prints it."""
    import rich.console
    import rich.table

    shown = rich.table.Table(title=table.caption, title_justify="left")
    for number, column in enumerate(table.columns):
        words = number < table.words or column == "remark"
        shown.add_column(column, justify="left" if words else "right")
    for row in table.rows:
        shown.add_row(*row)
    rich.console.Console(width=140).print(shown)


def markdown(table: Table) -> str:
    """The same for BENCHMARKS.md."""
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join([table.caption, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def write(section: str, tables: list[Table], path: pathlib.Path = BENCHMARKS) -> None:
    """Replaces what stands between the markers of a section, and nothing else.

    Raises:
      ValueError: the file does not have the two markers, once and in order.
    """
    first, last = f"<!-- {section}: written by scripts/benchmark.py -->", f"<!-- {section}: end -->"
    text = path.read_text()
    pattern = re.compile(f"{re.escape(first)}\n.*?{re.escape(last)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path} must have these two lines, once: {first} and {last}.")
    body = "\n\n".join(map(markdown, tables))
    path.write_text(pattern.sub(lambda _: f"{first}\n{body}\n{last}", text))
