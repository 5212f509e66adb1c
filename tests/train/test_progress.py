"""What a person sees while a run goes on, with and without a terminal."""
import io

import pytest
import rich.console

from rl_jax.train import progress

NUMBERS = {"reward/mean": 0.5, "policy/entropy": 0.25, "policy/kl_reference": 0.0123, "speed/tokens_per_s": 8123.4}


def run(steps, *, terminal=False, seconds=1.0, **options):
    """The text of a run whose steps take `seconds` each."""
    now, text = [0.0], io.StringIO()
    console = rich.console.Console(file=text, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
    with progress.Progress(100, console=console, clock=lambda: now[0], **options) as shown:
        for step in steps:
            now[0] += seconds
            shown.update(step, "rl", NUMBERS)
    return text.getvalue()


def test_plain_lines_come_every_few_seconds_and_at_the_end():
    lines = run(range(1, 101), every_s=10).splitlines()
    assert [line.split()[2] for line in lines] == [f"{step}/100" for step in (*range(1, 101, 10), 100)]
    assert lines[-1] == "rl step 100/100  reward 0.500  entropy 0.250  kl 0.0123  tok/s 8,123"
    assert "\x1b" not in "".join(lines)


def test_time_left_is_that_of_this_process():
    lines = run(range(61, 81), done=60, seconds=3.0, every_s=15).splitlines()
    assert lines[0] == "rl step 61/100  reward 0.500  entropy 0.250  kl 0.0123  tok/s 8,123"
    assert "step 76/100  1 min 12 s left" in lines[-1]


def test_a_terminal_gets_a_live_bar():
    text = run(range(1, 101), terminal=True)
    assert "\x1b[" in text and "100/100" in text and "reward 0.500" in text


def test_notes_are_printed_word_for_word():
    text = io.StringIO()
    with progress.Progress(1, console=rich.console.Console(file=text, width=20)) as shown:
        shown.note("[red]a checkpoint[/red] in a/rather/long/path/that/stays/whole")
    assert text.getvalue() == "[red]a checkpoint[/red] in a/rather/long/path/that/stays/whole\n"


def test_numbers_show_what_is_there():
    assert progress.numbers({"loss/total": 2, "rollout/entropy": 1.0}) == "loss 2.000  entropy 1.000"
    assert progress.numbers({}) == ""


@pytest.mark.parametrize("seconds, said", [(0.2, "0 s"), (42, "42 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"),
                                           (7500, "2 h 5 min"), (274000, "3 d 4 h")])
def test_durations(seconds, said):
    assert progress.duration(seconds) == said
