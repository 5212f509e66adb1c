"""Lanes against a plain Python queue, and what every schedule must give."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.rollout import lanes


def oracle(lengths, width, count):
    """(lane, slot, prompt, sample, position) of every step, in loops: a lane's slots are served in their order."""
    prompts, group = lengths.shape
    waiting = list(range(count, prompts))
    prompt, given = list(range(count)), [width] * count
    slot = [[(w, 0) for w in range(width)] for _ in range(count)]
    steps = []
    while any(one for lane in slot for one in lane):
        steps.append({(lane, w, prompt[lane], *slot[lane][w])
                      for lane in range(count) for w in range(width) if slot[lane][w]})
        for lane in range(count):
            for w in range(width):
                if slot[lane][w]:
                    sample, now = slot[lane][w]
                    slot[lane][w] = (sample, now + 1) if now + 1 < lengths[prompt[lane], sample] else None
            for w in range(width):
                if not slot[lane][w] and given[lane] < group:
                    slot[lane][w], given[lane] = (given[lane], 0), given[lane] + 1
            if not any(slot[lane]) and waiting:
                prompt[lane], given[lane] = waiting.pop(0), width
                slot[lane] = [(w, 0) for w in range(width)]
    return steps


def walked(lengths, width, count):
    """The same by the library's functions."""
    prompts, group = lengths.shape
    state, steps = lanes.first(width, count), []
    while state.busy.any():
        prompt, sample, now, busy = (np.asarray(a) for a in (state.prompt, state.sample, state.now, state.busy))
        found = [(lane, w, prompt[lane], sample[w, lane], now[w, lane]) for lane in range(count) for w in range(width)
                 if busy[w, lane]]
        rows = np.asarray(lanes.row(state, prompts, group))
        assert len(set(rows.ravel())) == rows.size and set(rows[busy]) == {p * group + s for _, _, p, s, _ in found}
        assert (rows[~busy] >= prompts * group).all() and (now[~busy] == 0).all()
        steps.append({tuple(int(a) for a in one) for one in found})
        alive = busy & (now + 1 < lengths[prompt[None], np.minimum(sample, group - 1)])
        state = lanes.advanced(state, jnp.asarray(alive), group)
        wanting = bool(lanes.wanting(state, prompts))
        before = state
        state = lanes.renewed(state, prompts)
        assert wanting == bool((before.prompt != state.prompt).any())
    return steps


@pytest.mark.parametrize(("prompts", "group", "slots"), [(1, 1, 1), (5, 4, 1), (5, 4, 6), (3, 2, 6), (2, 9, 7), (4, 3, 3)])
def test_slots_take_samples_and_prompts_as_a_queue_does(prompts, group, slots):
    lengths = np.random.default_rng(slots).integers(1, 5, (prompts, group))
    width, count = lanes.shape(slots, prompts, group)
    found, expected = walked(lengths, width, count), oracle(lengths, width, count)
    assert found == expected
    drawn = sorted((p, s, t) for step in found for _, _, p, s, t in step)
    assert drawn == [(p, s, t) for p in range(prompts) for s in range(group) for t in range(lengths[p, s])]


def test_a_lane_has_few_slots_but_all_slots_are_used():
    """W L <= slots, W <= G and L <= P for all of them; W is about the root of G where there are prompts enough."""
    for prompts in range(1, 6):
        for group in range(1, 10):
            for slots in range(1, prompts * group + 1):
                width, count = lanes.shape(slots, prompts, group)
                assert 1 <= width <= group and 1 <= count <= prompts and slots - width < width * count <= slots
    assert lanes.shape(32, 32, 8) == (2, 16) and lanes.shape(64, 100, 16) == (4, 16)
    assert lanes.shape(256, 32, 8) == (8, 32) and lanes.shape(2, 32, 64) == (2, 1)


def test_more_slots_than_answers_are_refused():
    with pytest.raises(ValueError, match="7 slots for 2 prompts x 3 samples = 6 answers: take no more"):
        lanes.shape(7, 2, 3)
