"""What the frameworks people use today get wrong, one test for each lesson of DESIGN.md, named after it."""
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from rl_jax import recipe as recipes
from rl_jax.advantage import group
from rl_jax.experiment import Phase, Scale
from rl_jax.learner import assemble, collect, evaluate, step, update
from rl_jax.learner.optimiser import Optimiser
from rl_jax.loss import divergence
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe, Rollout
from rl_jax.recipes.baselines import grpo, rloo
from rl_jax.recipes.loss import dapo_decoupled_clip
from rl_jax.reward import length
from rl_jax.rollout import decode
from rl_jax.selection import outcome
from rl_jax.tasks import generators, judge, reasoning_gym, tokenizer
from rl_jax.tasks.stream import Stream
from rl_jax.tasks.task import PureVerifier
from rl_jax.tasks.toys import addmod, token_tree
from rl_jax.train import evaluation, plan
from rl_jax.train.checkpoint import Checkpoints
from rl_jax.train.loop import PhaseLoop
from rl_jax.types import Samples, Verdict
from rl_jax.weighting import aggregate
from tests import numeric
from tests.learner import tiny
from tests.recipes import toy

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
END = TASK.tokenizer.end_id
V, P, G, T = TASK.tokenizer.size, 2, 2, 4


def loop_of(recipe, task, **scale):
    phase = Phase(recipe, Optimiser(learning_rate=1e-2), Scale(**{"steps": 4, "prompts_per_step": P} | scale))
    return PhaseLoop(phase, task, tiny.network(task), workers=tiny.InProcess(lambda fields, text: float(len(text) == 1)))


def samples(tokens, mask, logp=None):
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    number = jnp.zeros(mask.shape) if logp is None else jnp.asarray(logp, jnp.float32)
    return Samples(tokens=tokens, mask=mask, rollout_logp=number, rollout_entropy=jnp.zeros(mask.shape),
                   finished=jnp.ones(mask.shape[0], bool), version=jnp.zeros(mask.shape[0], jnp.int32))


def scored(score, failed=None):
    score = jnp.asarray(score, jnp.float32)
    return Verdict(score=score, parts={}, failed=jnp.zeros(score.shape, bool) if failed is None else jnp.asarray(failed))


def undecided(network):
    """Weights of a policy to which every token is equally probable."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape), jax.eval_shape(network.initialise, jax.random.key(0)))


@pytest.fixture(scope="module")
def one_question():
    """A run on a task with a single question, so that every step asks the same."""
    return loop_of(rloo.rloo(8), token_tree.token_tree(3, 3))


def test_a_fixed_key_for_every_rollout_is_never_used(one_question):
    state = one_question.initial_state(jax.random.key(0), undecided(one_question.network))
    drawn = [np.asarray(tick.experience.tokens) for tick in one_question.ticks(state, one_question.stream(0))]
    for i, tokens in enumerate(drawn):
        first, second = np.split(tokens, 2)  # two prompts that are the same one
        assert (first != second).any()
        assert all((tokens != other).any() for other in drawn[:i])


def test_a_kl_estimator_used_as_a_loss_says_which_gradient_it_has():
    """Mean gradients over every token of a softmax: k1 none, k2 of KL(policy || reference), k3 of the other direction."""
    z, other = numeric.normal(0, 6), jax.nn.log_softmax(jnp.asarray(numeric.normal(1, 6), jnp.float32))
    z = jnp.asarray(z, jnp.float32)
    p = jax.nn.softmax(z)

    def mean_gradient(estimator):
        def mean(z):
            return (p * estimator(jax.nn.log_softmax(z)[None], other[None])[0]).sum()

        return jax.grad(mean)(z)

    def reverse(z):
        logp = jax.nn.log_softmax(z)
        return (jnp.exp(logp) * (logp - other)).sum()

    def forward(z):
        return (jnp.exp(other) * (other - jax.nn.log_softmax(z))).sum()

    np.testing.assert_allclose(mean_gradient(divergence.k1), 0.0, atol=1e-6)
    np.testing.assert_allclose(mean_gradient(divergence.k2), jax.grad(reverse)(z), atol=1e-6)
    np.testing.assert_allclose(mean_gradient(divergence.k3), jax.grad(forward)(z), atol=1e-6)
    assert "KL(policy || reference)" in divergence.k2.__doc__ and "KL(reference || policy)" in divergence.k3.__doc__


APPLIED = []


class Counted(Network):
    """Counts applications of the whole network while a program is traced."""

    def hidden(self, parameters, *given):
        APPLIED.append(1)
        return super().hidden(parameters, *given)


@pytest.mark.parametrize(("beta", "applications"), [(0.0, 1), (0.1, 2)])
def test_a_reference_forward_is_not_run_when_no_term_needs_it(beta, applications):
    recipe, network, optimiser = grpo.grpo(G, beta=beta), Counted(tiny.network(TASK).shape), tiny.recorder()
    pieces = step.make_pieces(recipe, TASK, network, optimiser, judge.pure(TASK.verifier))
    state = jax.eval_shape(lambda key: step.initial_state(recipe, network, optimiser, key), jax.random.key(0))
    APPLIED.clear()
    jax.eval_shape(step.composed(pieces), state, tiny.prompts(TASK, P))
    assert len(APPLIED) == applications and ("reference" in state.frozen) == (beta > 0)


def test_overlong_penalties_count_tokens_not_characters():
    """Two answers of three tokens, one of them with many more characters, pay the same."""
    words = tokenizer.load()
    ids = sorted(range(words.size), key=lambda i: len(words.decode([i])))
    short, long = ids[:3], ids[-3:]
    assert len(words.decode(long)) > len(words.decode(short)) + 3
    mask = jnp.array([[True] * 3 + [False]] * 2)
    recipe = dapo_decoupled_clip.dapo_decoupled_clip(2, limit=4, buffer=2)
    x = assemble.experience(toy.prompts(1), samples([[*short, 0], [*long, 0]], mask), scored([1.0, 1.0]))
    np.testing.assert_array_equal(recipe.reward(x), [0.5, 0.5])
    np.testing.assert_array_equal(length.soft_overlong(jnp.ones((1, 4), bool), 4, 2), -1.0)


@pytest.mark.parametrize(("pad", "other"), [(TASK.tokenizer.pad_id, END), (END, END), (END, 3), (3, 3)])
def test_eos_is_a_chosen_token_and_keeps_its_loss(pad, other):
    """Also where padding shares its id, and where a second token ends answers.

    Uniform policy: the random number (i + 1/2) / V draws token i.
    """
    network = tiny.network(TASK)
    policy = undecided(network)
    script = jnp.array([[[3, END, 5, 5], [END, 4, 4, 4]], [[2, 2, 2, 2], [2, 2, 2, END]]])
    draw = decode.make_rollout(network, Rollout(G), completion_length=T, stop_ids=(END, other), pad_id=pad)
    drawn = jax.jit(draw)(policy, tiny.prompts(TASK, P), (script + 0.5) / V, jnp.int32(0))
    chosen = np.arange(T) < np.array([1 if other == 3 else 2, 1, 4, 4])[:, None]
    np.testing.assert_array_equal(drawn.mask, chosen)
    np.testing.assert_array_equal(drawn.tokens, np.where(chosen, script.reshape(-1, T), pad))
    np.testing.assert_array_equal(drawn.finished, [True, True, False, True])
    x = assemble.experience(tiny.prompts(TASK, P), drawn, scored([1.0, 0.0, 1.0, 0.0]))
    recipe = rloo.rloo(G)

    def loss(logp):
        policy = dataclasses.replace(toy.policy(x), logp=logp)
        return update.batch_loss(recipe, policy, x)[0]

    slope = np.asarray(jax.grad(loss)(x.rollout_logp))
    assert (slope[chosen] != 0).all() and (slope[~chosen] == 0).all()


def test_dynamic_sampling_replaces_groups_within_a_budget_and_counts_the_discarded():
    """Six groups of which two disagree: they fill the batch; four are counted as thrown away."""
    scores = jnp.array([[0, 0], [1, 1], [0, 1], [1, 1], [0, 0], [1, 0]], jnp.float32)
    recipe = Recipe(rollout=Rollout(G, resample=2), selection=lambda x: outcome.mixed(x.score, x.group),
                    loss=lambda policy, x: policy.logp, weighting=lambda x: x.mask)

    def draw(parameters, prompts, uniforms, version, coefficient):
        return samples(jnp.repeat(prompts.example, G)[:, None], jnp.ones((P * G, 1), bool))

    def judged(prompts, drawn):
        return scored(scores[prompts.example].reshape(-1))

    ask = jax.jit(collect.make_collect(recipe, draw, judged))
    prompts, _, verdict, metrics = ask(None, toy.prompts(6), jnp.zeros((6, G, 1)), jnp.int32(0))
    np.testing.assert_array_equal(prompts.example, [2, 5])
    np.testing.assert_array_equal(verdict.score, [0, 1, 1, 0])
    assert metrics["rollout/groups_discarded"] == 4 and metrics["rollout/waves"] == 3


def test_means_never_run_over_padding():
    """Twice as much padding changes neither the loss nor what is reported."""
    recipe = grpo.grpo(3, beta=0.0)
    x = toy.experience(recipe)
    wide = [(0, 0), (0, x.mask.shape[1])]

    def padded(tree):
        return jax.tree.map(lambda a: jnp.pad(a, wide) if a.ndim == 2 and a.shape == x.mask.shape else a, tree)

    policy = toy.policy(x)
    for weighting in (aggregate.token_mean, aggregate.sequence_mean_token_mean, aggregate.sequence_mean_token_sum):
        recipe = recipes.replace(recipe, weighting=lambda x, w=weighting: w(x.mask))
        np.testing.assert_allclose(update.batch_loss(recipe, padded(policy), padded(x))[0],
                                   update.batch_loss(recipe, policy, x)[0], rtol=1e-6)


def test_means_never_run_over_microbatches():
    """The token mean of unequal halves is not the mean of their token means, and the update is that of the whole."""
    recipe = recipes.replace(rloo.rloo(3), weighting=lambda x: aggregate.token_mean(x.mask))
    x = assemble.with_advantage(recipe, toy.experience(recipe))
    gradients = [jax.jit(update.make_gradient(recipe, toy.evaluate, n))(toy.parameters(), x)[0] for n in (1, 2)]
    tiny.same(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)

    def half(tree, i):
        return jax.tree.map(lambda a: jnp.split(a, 2)[i], dataclasses.replace(tree, coefficients=None))

    mistaken = [jax.grad(lambda p, x=half(x, i): update.weighted_loss(
        recipe, toy.evaluate(p, x), x, aggregate.token_mean(x.mask), update.token_share(x))[0])(toy.parameters())
        for i in range(2)]
    assert not np.allclose(jax.tree.map(lambda a, b: (a + b) / 2, *mistaken)["logits"], gradients[0]["logits"], rtol=0.05)


def test_truncated_sampling_changes_the_behaviour_log_probability():
    """What is recorded is the trainer's log-probability among the kept tokens, above the plain one by the mass cut."""
    network, rollout = tiny.network(TASK), Rollout(G, top_k=3)
    policy = network.initialise(jax.random.key(0))
    draw = decode.make_rollout(network, rollout, completion_length=T, stop_ids=(END,), pad_id=0)
    prompts = tiny.prompts(TASK, P)

    @jax.jit
    def both(policy):
        drawn = draw(policy, prompts, decode.make_uniforms(jax.random.key(1), P, G, T), jnp.int32(0))
        x = assemble.experience(prompts, drawn, scored(jnp.zeros(P * G)))
        policy_of = evaluate.make_evaluate(network, 1.0)
        with_support, without = (policy_of({"policy": policy}, y) for y in (x, dataclasses.replace(x, support=None)))
        return x, with_support.logp, without.logp

    x, truncated, plain = both(policy)
    mask = np.asarray(x.mask)
    np.testing.assert_allclose(np.asarray(x.rollout_logp)[mask], np.asarray(truncated)[mask], atol=1e-4)
    assert (np.asarray(x.rollout_logp) - np.asarray(plain))[mask].min() > 0.01


def test_a_verifiers_failure_is_not_a_zero_reward():
    """Rewards 1, 1 and a failure: nobody is better than anybody, where a silent 0 would have taught something."""
    mask = jnp.ones((3, 2), bool)
    failed = assemble.experience(toy.prompts(1), samples(jnp.zeros((3, 2), int), mask), scored([1, 1, 0], [False, False, True]))
    silent = assemble.experience(toy.prompts(1), samples(jnp.zeros((3, 2), int), mask), scored([1, 1, 0]))
    np.testing.assert_array_equal(group.zscore(failed.reward, failed.group)[:2], 0.0)
    assert (group.zscore(silent.reward, silent.group)[:2] > 0.5).all()
    assert not failed.mask[2].any() and failed.mask[:2].all()
    said = judge.pure(PureVerifier(lambda facts, tokens, mask: (jnp.array([1.0, jnp.nan, 0.0]), {})))(
        toy.prompts(1), samples(jnp.zeros((3, 2), int), mask))
    np.testing.assert_array_equal(said.failed, [False, True, False])


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def test_resume_is_bit_exact_with_rollouts_in_flight(tmp_path):
    """Two programs: at the save the next batch is drawn and not scored. State and cursor lie in one step's directory."""
    loop = loop_of(rloo.rloo(G), tiny.on_host(TASK), program="split")
    with Checkpoints(tmp_path) as saved:
        for tick in loop.ticks(loop.initial_state(jax.random.key(0)), loop.stream(3)):
            if tick.done == 2:
                like = shapes((tick.state, tick.pending))
                saved.save(2, tick.state, {"phase": 0, "data": tick.data}, pending=tick.pending)
            expected = tick.state, tick.metrics
    items = {path.name for path in (tmp_path / "checkpoints" / "2").iterdir()}
    assert items >= {"parameters", "training", "cursor", "pending"}

    stream = loop.stream(3)
    with Checkpoints(tmp_path) as saved:  # the first manager is closed: another may open the directory
        stream.restore(saved.cursor(2)["data"])
        state, pending = saved.restore(2, like[0]), saved.restore_pending(2, like[1])
    for tick in loop.ticks(state, stream, done=2, pending=pending):
        found = tick.state, tick.metrics
    tiny.same(found, expected)
    assert int(found[0].step) == 4


def test_a_cursor_is_checked_against_what_it_is_a_position_in():
    """A grain state is only an index: dataset, split, seed and tokenizer are stored beside it."""
    cursor = Stream(TASK, "train", 2, seed=0).state()
    longer = tiny.on_host(dataclasses.replace(TASK, fingerprint="other questions"))
    others = [Stream(TASK, "train", 2, seed=1), Stream(longer, "train", 2, seed=0), Stream(TASK, "train", 4, seed=0),
              Stream(addmod.addmod(4, validation_size=0, held_out_size=3), "held_out", 2, seed=0)]
    for other in others:
        with pytest.raises(ValueError, match="belongs to another stream .*saved .* now"):
            other.restore(cursor)
    other_words = dataclasses.replace(TASK, tokenizer=dataclasses.replace(TASK.tokenizer, characters="+=0123456789"))
    with pytest.raises(ValueError, match="tokenizer: saved"):
        Stream(other_words, "train", 2, seed=0).restore(cursor)
    Stream(TASK, "train", 2, seed=0).restore(cursor)


def test_with_steps_per_call_stopping_happens_at_its_multiples(one_question):
    """Each tick is a dispatch of K steps, with a state and a data position that belong together."""
    loop = loop_of(rloo.rloo(G), TASK, steps=6, steps_per_call=3)
    stream = loop.stream(0)
    seen = [(tick.done, int(tick.state.step), tick.data) for tick in loop.ticks(loop.initial_state(jax.random.key(0)), stream)]
    assert [(done, count) for done, count, _ in seen] == [(3, 3), (6, 6)]
    single = loop.stream(0)
    for _ in range(3):
        next(single)
    assert seen[0][2] == single.state()


def test_held_out_data_is_really_held_out():
    """The generator repeats itself under close seeds; the splits share no question, and say how many were left out."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = reasoning_gym.reasoning_gym("chain_sum", options=options, train_size=40, validation_size=10, held_out_size=10,
                                       keep_after=": ")
    texts = {name: [e.text for e in split] for name, split in task.splits.items()}
    assert len(set(texts["held_out"])) == 10 and len(texts["train"]) == 40
    for one, other in (("train", "held_out"), ("train", "validation"), ("validation", "held_out")):
        assert not set(texts[one]) & set(texts[other])
    assert "left out" in task.report and "train 40 of 40" in task.report
    near = [[generators.dataset("chain_sum", options, seed=seed, size=20)[i]["question"] for i in range(20)] for seed in (0, 5)]
    assert len(set(near[0]) & set(near[1])) >= 15


def test_partial_credit_is_never_pass_at_1():
    assert evaluation.pass_at_k(np.array([[0.99, 0.5], [1.0, 0.3]]), 1).value == pytest.approx(0.25)
    options = {"min_terms": 2, "max_terms": 2}
    task = reasoning_gym.reasoning_gym("chain_sum", options=options, train_size=4, validation_size=0, held_out_size=0,
                                       keep_after=": ")
    entry = task.splits["train"][0].fields
    nearly = task.verifier.score(entry, entry["answer"] + " or so")
    assert nearly["score"] == 0 and task.verifier.score(entry, entry["answer"])["score"] == 1


def test_before_the_first_step_the_program_prints_its_cost_and_refuses_what_cannot_fit(one_question):
    loop = one_question
    state, prompts = jax.eval_shape(loop.initial_state, jax.random.key(0)), shapes(next(loop.stream(0)))
    found = plan.rows(loop, state, prompts)
    assert {"prefill", "update: forward and backward", "optimiser", "held: parameters"} <= {row.phase for row in found}
    assert all(row.bytes > 0 for row in found if row.phase != "held: frozen")
    assert next(row for row in found if row.phase.startswith("update")).flops > 1e4
    said = io.StringIO()
    rich.console.Console(file=said, width=120).print(plan.table(found, "rloo"))
    assert "GFLOP" in said.getvalue() and "prefill" in said.getvalue()
    plan.check_memory(loop)
    small = dataclasses.replace(loop.phase, scale=dataclasses.replace(loop.phase.scale, memory_limit_gib=1e-6))
    refused = PhaseLoop(small, loop.task, loop.network)
    refused.compiled = loop.compiled
    with pytest.raises(ValueError, match="Raise scale.microbatches .*memory_limit_gib"):
        plan.check_memory(refused)
