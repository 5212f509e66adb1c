"""The compiled step in all its forms gives what the plain one gives; the host's verdicts reach it, and its faults do not."""
import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax import recipe as recipes
from rl_jax.batching import Batching
from rl_jax.learner import step
from rl_jax.recipe import Rollout, Schedule
from rl_jax.recipes.baselines import grpo, reinforce, rloo, sft
from rl_jax.recipes.loss import dapo_decoupled_clip
from rl_jax.schedule import control
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod, bandit
from tests.learner import tiny

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
P, G, K, SEEDS = 4, 2, 3, 2
OPTIMISER = optax.adam(1e-2)
RECIPE = rloo.rloo(G)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def plain():
    """The single step, compiled once for this file."""
    return jax.jit(step.composed(tiny.pieces(RECIPE, TASK, OPTIMISER)))


def run_plain(state, batches):
    results = []
    for prompts in batches:
        state, *result = plain()(state, prompts)
        results.append(result)
    return state, jax.tree.map(lambda *a: jnp.stack(a), *results)


def batches(count=K):
    return [tiny.prompts(TASK, P, first=P * i) for i in range(count)]


def stacked(trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def test_steps_in_one_dispatch_are_single_steps_bit_for_bit():
    many = jax.jit(step.composed(tiny.pieces(RECIPE, TASK, OPTIMISER), steps_per_call=K))
    state, metrics, x = many(tiny.state(RECIPE, TASK, OPTIMISER), stacked(batches()))
    expected, (expected_metrics, expected_x) = run_plain(tiny.state(RECIPE, TASK, OPTIMISER), batches())
    tiny.same(state, expected)
    tiny.same(x, expected_x)
    tiny.same(metrics, expected_metrics, rtol=1e-5, atol=1e-7)  # numbers to look at; sums may be reordered
    assert int(state.step) == K


def test_replicas_are_runs_of_their_own():
    """Each as a single run with the replica's key; several steps in one dispatch."""
    pieces = tiny.pieces(RECIPE, TASK, OPTIMISER, axis=step.SEED_AXIS)
    run = jax.jit(step.composed(pieces, steps_per_call=K, seeds=SEEDS))
    states = [tiny.state(RECIPE, TASK, OPTIMISER, seed) for seed in range(SEEDS)]
    found, metrics, x = run(stacked(states), stacked(batches()))
    assert x.tokens.shape == (SEEDS, K, P * G, TASK.completion_length) and metrics["reward/mean"].shape == (SEEDS, K)
    for r in range(SEEDS):
        expected, (_, expected_x) = run_plain(states[r], batches())
        np.testing.assert_array_equal(x.tokens[r], expected_x.tokens)
        tiny.same(jax.tree.map(lambda a, r=r: a[r], found), expected, rtol=1e-5, atol=1e-6)
    assert (x.tokens[0] != x.tokens[1]).any()


@pytest.mark.parametrize("seeds", [1, SEEDS])
def test_a_step_that_draws_in_few_slots_is_the_same_step(seeds):
    """More answers than slots, alone and in replicas; only products of other shapes may round otherwise."""
    axis = step.SEED_AXIS if seeds > 1 else None
    pieces = tiny.pieces(RECIPE, TASK, OPTIMISER, axis=axis, batching=Batching(slots=3))
    state, prompts = [tiny.state(RECIPE, TASK, OPTIMISER, seed) for seed in range(seeds)], tiny.prompts(TASK, P)
    found = jax.jit(step.composed(pieces, seeds=seeds))(stacked(state) if axis else state[0], prompts)
    for r in range(seeds):
        expected = plain()(state[r], prompts)
        of_one = jax.tree.map(lambda a, r=r: a[r], found) if axis else found
        np.testing.assert_array_equal(of_one[2].tokens, expected[2].tokens)
        tiny.same(of_one[::2], expected[::2], rtol=1e-5, atol=1e-6)
        tiny.same(of_one[1], expected[1], rtol=1e-4, atol=1e-6)


def test_two_programs_without_staleness_are_the_one_program():
    pieces = tiny.pieces(RECIPE, TASK, OPTIMISER)
    draw, learn = jax.jit(step.make_draw(pieces)), jax.jit(step.make_learn(pieces))
    state = tiny.state(RECIPE, TASK, OPTIMISER)
    for index, prompts in enumerate(batches()):
        samples = draw(state, prompts, jnp.int32(index))
        verdict = judge.pure(TASK.verifier)(prompts, samples)
        expected = plain()(state, prompts)
        state, metrics, x = learn(state, prompts, samples, verdict)
        tiny.same(x.tokens, expected[2].tokens)
        tiny.same(x.version, np.full(P * G, index))
        tiny.same((state, x), expected[::2], rtol=1e-5, atol=1e-7)
        tiny.same(metrics, expected[1], rtol=1e-4, atol=1e-6)


def test_no_two_steps_draw_alike():
    """The same weights and prompts at every step: only the number of the step differs."""
    run = jax.jit(step.composed(tiny.pieces(RECIPE, TASK, tiny.recorder())))
    state, prompts, drawn = tiny.state(RECIPE, TASK, tiny.recorder()), tiny.prompts(TASK, P), []
    for _ in range(4):
        state, _, x = run(state, prompts)
        drawn.append(np.asarray(x.tokens).tobytes())
    assert len(set(drawn)) == 4


def test_given_answers_are_learned_from_without_drawing():
    recipe = sft.sft()
    prompts, run = tiny.prompts(TASK, P, need_answers=True), jax.jit(step.composed(tiny.pieces(recipe, TASK, OPTIMISER)))
    state, losses = tiny.state(recipe, TASK, OPTIMISER), []
    for _ in range(20):
        state, metrics, x = run(state, prompts)
        losses.append(float(metrics["loss/total"]))
    np.testing.assert_array_equal(x.tokens, prompts.answer)
    np.testing.assert_array_equal(x.mask, prompts.answer_mask)
    assert losses[-1] < 0.7 * losses[0] and not any(name.startswith("rollout/") for name in metrics)
    with pytest.raises(ValueError, match="learns from given answers .rollout=None., and the prompts have none"):
        jax.eval_shape(run, state, tiny.prompts(TASK, P))


def test_shown_groups_are_the_first_ones():
    run = step.composed(tiny.pieces(RECIPE, TASK, OPTIMISER), shown_groups=2)
    x = jax.eval_shape(run, tiny.state(RECIPE, TASK, OPTIMISER), tiny.prompts(TASK, P))[2]
    assert x.tokens.shape[0] == 2 * G and x.prompts.lengths.shape == (2,)
    whole = plain()(tiny.state(RECIPE, TASK, OPTIMISER), tiny.prompts(TASK, P))[2]
    shown = step.first_groups(whole, 2)
    tiny.same(shown.tokens, whole.tokens[:2 * G])
    tiny.same(shown.prompts.example, whole.prompts.example[:2])


def test_the_reward_is_a_mean_over_what_was_scored():
    """Not over slots that stayed empty, nor over what was left out of the loss."""
    task, recipe = bandit.bandit(), dapo_decoupled_clip.dapo_decoupled_clip(group_size=2, resample=1, limit=1, buffer=1)
    run = jax.jit(step.composed(tiny.pieces(recipe, task, OPTIMISER)))
    _, metrics, x = run(tiny.state(recipe, task, OPTIMISER, seed=3), tiny.prompts(task, 2 * P))
    drawn = np.asarray(x.mask).any(axis=1)  # every group that fills a slot has been kept
    assert 0 < drawn.sum() < len(drawn)
    assert float(metrics["reward/mean"]) == pytest.approx(np.asarray(x.reward)[drawn].mean(), rel=1e-5)


# Host verifiers


HOST = tiny.on_host(TASK)


def parity(fields, text):
    """1 for an even number, half for an odd one, no verdict for anything else."""
    return None if not text.isdigit() else 1.0 if int(text) % 2 == 0 else 0.5


class Moody(tiny.InProcess):
    """A scorer that sometimes raises."""

    broken = False

    def score(self, fields, texts):
        if self.broken:
            raise OSError("the workers are gone")
        assert all(f["text"].endswith("=") for f in fields)
        return super().score(fields, texts)


def test_a_hosts_verdict_reaches_the_reward_and_its_faults_do_not_reach_xla():
    recipe, scorer = reinforce.reinforce(G), Moody(parity)
    judged = judge.make_judge(HOST, "train", workers=scorer)
    run = jax.jit(step.composed(tiny.pieces(recipe, HOST, OPTIMISER, judged=judged)), donate_argnums=0)
    state, before = tiny.state(recipe, HOST, OPTIMISER), tiny.state(recipe, HOST, OPTIMISER)
    state, metrics, x = run(state, tiny.prompts(HOST, P))
    texts = judge.texts_of(HOST.tokenizer, np.asarray(x.tokens), np.asarray(x.mask | x.failed[:, None]))
    said = [parity({}, text) for text in scorer.calls[0]]
    assert len(scorer.calls) == 1 and 0 < said.count(None) < len(said)
    assert [t for t, s in zip(texts, said, strict=True) if s is not None] == [
        t for t, s in zip(scorer.calls[0], said, strict=True) if s is not None]
    np.testing.assert_array_equal(x.failed, [s is None for s in said])
    np.testing.assert_array_equal(x.reward, [s or 0.0 for s in said])
    assert not x.mask[x.failed].any() and metrics["reward/failed"] == said.count(None)
    scored = [s for s in said if s is not None]
    assert float(metrics["reward/score"]) == float(metrics["reward/mean"]) == pytest.approx(np.mean(scored))

    scorer.broken, learnt = True, jax.device_get(state.parameters)
    state, metrics, x = run(state, tiny.prompts(HOST, P))
    assert x.failed.all() and metrics["reward/failed"] == P * G and metrics["gradient/norm"] == 0
    scorer.broken = False
    state, metrics, _ = run(state, tiny.prompts(HOST, P))
    assert int(state.step) == 3 and np.isfinite(jax.flatten_util.ravel_pytree(state.parameters)[0]).all()
    assert jax.tree.structure(learnt) == jax.tree.structure(before.parameters)


def test_the_host_is_needed_for_a_host_verifier():
    with pytest.raises(ValueError, match="host verifier: make_judge needs `workers`"):
        judge.make_judge(HOST, "train")


TWO_DEVICES = '''
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tests.learner import test_step as t, tiny

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
scorer = tiny.InProcess(t.parity)
judged = t.judge.make_judge(t.HOST, "train", workers=scorer, mesh=mesh)
recipe = t.reinforce.reinforce(t.G)
run = jax.jit(t.step.composed(tiny.pieces(recipe, t.HOST, t.OPTIMISER, judged=judged)))
state = jax.device_put(tiny.state(recipe, t.HOST, t.OPTIMISER), NamedSharding(mesh, PartitionSpec()))
prompts = jax.device_put(tiny.prompts(t.HOST, t.P), NamedSharding(mesh, PartitionSpec("data")))
state, metrics, x = run(state, prompts)
jax.block_until_ready(state)
print(len(scorer.calls), [len(c) for c in scorer.calls])
texts = t.judge.texts_of(t.HOST.tokenizer, np.asarray(x.tokens), np.asarray(x.mask | x.failed[:, None]))
half = len(texts) // 2
scorable = [[u if t.parity({}, u) is not None else None for u in c] for c in (texts[:half], texts[half:])]
asked = [[u if t.parity({}, u) is not None else None for u in c] for c in scorer.calls]
assert sorted(map(str, scorable)) == sorted(map(str, asked)), (scorable, asked)
one = t.judge.make_judge(t.HOST, "train", workers=tiny.InProcess(t.parity))
expected = jax.jit(t.step.composed(tiny.pieces(recipe, t.HOST, t.OPTIMISER, judged=one)))(
    tiny.state(recipe, t.HOST, t.OPTIMISER), tiny.prompts(t.HOST, t.P))
np.testing.assert_array_equal(x.tokens, expected[2].tokens)
tiny.same(state.parameters, expected[0].parameters, rtol=1e-4, atol=1e-6)
'''


def test_every_device_asks_the_host_about_its_own_rows():
    """Two devices: two calls of half the rows each, and the update of one device."""
    compiler = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {"XLA_FLAGS": compiler, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin",
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", TWO_DEVICES], env=environment, cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"2 [{P * G // 2}, {P * G // 2}]"


# Adapting coefficients


def test_coefficients_adapt_and_are_read_in_the_slots():
    """KL to a reference that is far away: above its target, so the coefficient rises by gain x band each step."""
    def loss(policy, x):
        penalty = x.coefficient.kl * (policy.logp - x.reference_logp)
        return -x.advantage * policy.logp + penalty, {"loss/kl": jnp.broadcast_to(x.coefficient.kl, x.mask.shape)}

    adapting = control.adaptive_kl(0.5, target=1e-3, gain=0.1, band=0.2)
    recipe = recipes.replace(grpo.grpo(G), loss=loss, schedule=Schedule(epochs=2, controls={"kl": adapting}))
    run = jax.jit(step.composed(tiny.pieces(recipe, TASK, OPTIMISER, microbatches=2)))
    state = tiny.state(recipe, TASK, OPTIMISER)
    state = dataclasses.replace(state, frozen={"reference": jax.tree.map(lambda a: 3 * a, state.frozen["reference"])})
    for _ in range(2):
        value = state.control["kl"]
        state, metrics, x = run(state, tiny.prompts(TASK, P))
        np.testing.assert_allclose([metrics["control/kl"], metrics["loss/kl"]], value, rtol=1e-6)
        measured = control.divergence_per_sequence(x.rollout_logp, x.reference_logp, x.mask)
        expected = control.proportional(value, measured, 1e-3, 0.1, 0.2)
        assert float(state.control["kl"]) == pytest.approx(float(expected), rel=1e-4) != float(value)


def test_skipped_steps_in_a_row_are_counted_and_a_good_one_starts_anew():
    """The loss divides by zero at odd steps."""
    recipe = recipes.replace(RECIPE, loss=lambda policy, x: policy.logp / (1 - x.version % 2)[:, None].astype(jnp.float32),
                             rollout=Rollout(G))
    run, state, counts = jax.jit(step.composed(tiny.pieces(recipe, TASK, OPTIMISER))), tiny.state(recipe, TASK, OPTIMISER), []
    for _ in range(3):
        before = jax.device_get(state.parameters)
        state, metrics, _ = run(state, tiny.prompts(TASK, P))
        counts.append((int(state.skipped), float(metrics["gradient/skipped"])))
        unchanged = jax.tree.map(np.array_equal, before, jax.device_get(state.parameters))
        assert all(jax.tree.leaves(unchanged)) == (counts[-1][0] > 0)
    assert counts == [(0, 0.0), (1, 1.0), (0, 0.0)] and int(state.step) == 3


def test_the_callers_weights_survive_the_first_step():
    task, recipe, optimiser = bandit.bandit(), grpo.grpo(beta=0.0, group_size=2), optax.sgd(0.1)
    policy = tiny.network(task).initialise(jax.random.key(0))
    state = jax.jit(lambda key, policy: step.initial_state(recipe, tiny.network(task), optimiser, key, policy))(
        jax.random.key(1), policy)
    step.make_step(recipe, task, tiny.network(task), optimiser)(state, tiny.prompts(task, 1))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(policy))
