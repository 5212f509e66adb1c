"""The weights of a run by "best", "latest", a step or a phase, and what scores and costs are made of."""
import dataclasses

import jax
import numpy as np
import pytest

from rl_jax import experiment, sections
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.tasks import task as tasks
from rl_jax.train import checkpoint, examine, loop, metrics, plan, trained
from tests.ends import tiny
from tests.ends.conftest import cache_directory, compiled_once  # noqa: F401  (fixtures)

CONFIG = tiny.config(warm_start=2, steps=4, run={"checkpoint_every": 1, "keep_last": 9, "validate_every": 2,
                                                 "validation_prompts": 3, "validation_samples": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, tiny.train(workdir, CONFIG)[0]


def test_weights_are_those_of_the_checkpoint_asked_for(run):
    workdir, finished = run
    latest = trained.load(workdir, "latest")
    assert latest.step == 6 and tiny.bits(latest.policy) == tiny.bits(finished.policy)
    assert tiny.bits(trained.load(workdir, "6").policy) == tiny.bits(finished.policy)
    supervised = trained.load(workdir, "sft")
    assert supervised.step == 2 and tiny.bits(supervised.policy) == tiny.bits(trained.load(workdir, "2").policy)
    assert tiny.bits(supervised.policy) != tiny.bits(finished.policy)
    scores = {row["step"]: row["validation/pass@1"] for row in metrics.rows(workdir / "metrics.jsonl")
              if "validation/pass@1" in row}
    assert scores[trained.load(workdir).step] == max(scores.values())
    assert latest.network.shape == experiment.parse(CONFIG).shape


def test_looking_changes_nothing(run):
    workdir, _ = run
    before = sorted(str(path) for path in workdir.rglob("*"))
    for which in ("best", "latest", "3"):
        trained.load(workdir, which)
    assert sorted(str(path) for path in workdir.rglob("*")) == before


@pytest.mark.parametrize("which, said", [("newest", "allowed are best, latest, a phase of .*'sft', 'reinforce'.*"),
                                         ("7", "no checkpoint of step 7"), ("-1", "allowed are")])
def test_what_is_not_there_is_refused(run, which, said):
    with pytest.raises(ValueError, match=said):
        trained.load(run[0], which)


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        trained.load(tmp_path)
    tiny.session.claim(tmp_path, sections.plain(CONFIG))
    with pytest.raises(ValueError, match="no finished checkpoint yet: train it first"):
        trained.load(tmp_path)


class Scorer:
    """Stands for the worker processes: an answer scores 1 if it begins with the question's first digit, "0" fails."""

    def score(self, fields, texts):
        failed = np.array([text.startswith("0") for text in texts])
        return np.array([float(text[:1] == f["first"]) for f, text in zip(fields, texts)], np.float32), {}, failed


def test_problems_are_scored_once_each_in_order_whatever_the_batch():
    """A last batch that is not full is filled up and cut off again."""
    parsed = experiment.parse(CONFIG)
    examples = [dataclasses.replace(one, fields={"first": one.text[0]}) for one in parsed.task.splits["train"]][:5]
    task = dataclasses.replace(parsed.task, splits={"train": examples}, verifier=tasks.HostVerifier(dict))
    network = Network(parsed.shape)
    policy, key, reports = network.initialise(jax.random.key(0)), jax.random.key(1), []
    examiner = examine.Examiner(network, task, "train", rollout=Rollout(group_size=40), problems_per_batch=2,
                                workers=Scorer())
    found = examiner(policy, key, after_batch=lambda *done: reports.append(done))
    assert found.scores.shape == found.failed.shape == (5, 40) and reports == [(2, 5), (4, 5), (5, 5)]
    assert [len(answers) for answers in found.answers] == [40] * 5
    for one, scores, failed, answers in zip(examples, found.scores, found.failed, found.answers, strict=True):
        begins = [(answer or " ")[0] for answer in answers]
        np.testing.assert_array_equal(scores, [float(first == one.text[0]) for first in begins])
        np.testing.assert_array_equal(failed, [first == "0" for first in begins])
    again = examiner(policy, key, problems=3)
    np.testing.assert_array_equal(again.scores, found.scores[:3])
    assert len({tuple(answers) for answers in found.answers}) == 5, "no two batches draw the same"


def test_an_unknown_split_is_refused():
    parsed = experiment.parse(CONFIG)
    with pytest.raises(ValueError, match="split='test': task 'addmod' has .*held_out"):
        examine.Examiner(Network(parsed.shape), parsed.task, "test", rollout=Rollout())


@pytest.fixture(scope="module")
def prepared():
    """A phase with its programs compiled, and the shapes of a dispatch."""
    parsed = experiment.parse(tiny.config(recipe="baselines.grpo", recipe_args={"epochs": 2}))
    one = loop.PhaseLoop(parsed.phases[-1], parsed.task, Network(parsed.shape))
    state = jax.eval_shape(one.initial_state, jax.random.key(0))
    prompts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
                           loop.batches(one.stream(0), one.phase.scale.steps_per_call))
    one.prepare(state, prompts)
    return one, state, prompts


def test_the_plan_counts_what_is_known_exactly(prepared):
    one, state, prompts = prepared
    rows = {row.phase: row for row in plan.rows(one, state, prompts)}
    numbers = sum(a.size for a in jax.tree.leaves(state.parameters))
    assert rows["held: parameters"].bytes == rows["held: frozen"].bytes == 4 * numbers
    assert 2 * 4 * numbers <= rows["held: optimiser"].bytes <= 2 * 4 * numbers + 64, "two moments and counters"
    update, reference = rows["update: forward and backward"], rows["reference forward"]
    assert 2 * 2 * reference.flops < update.flops < 2 * 5 * reference.flops, "per epoch about three forwards"
    assert rows["prefill"].flops > 0 and rows["decode, 2 steps"].flops > 0
    assert plan.needed_bytes(one) >= sum(rows[f"held: {name}"].bytes for name in ("parameters", "optimiser", "frozen"))
    table = plan.table(list(rows.values()), "step")
    assert table.row_count == len(rows)


def test_a_limit_below_what_is_needed_is_refused_and_one_above_is_not(prepared):
    one, _, _ = prepared
    gib = plan.needed_bytes(one) / plan.GIB
    for limit, fits in ((gib * 1.01, True), (gib * 0.99, False)):
        scale = dataclasses.replace(one.phase.scale, memory_limit_gib=limit)
        one.phase = dataclasses.replace(one.phase, scale=scale)
        if fits:
            plan.check_memory(one)
        else:
            with pytest.raises(ValueError, match=r"GiB are allowed\. Raise scale\.microbatches"):
                plan.check_memory(one)


def test_the_two_program_mode_learns_from_the_batch_before(tmp_path):
    """Batch k > 0 is drawn by the weights after k - 1 updates, while batch k - 1 is scored."""
    parsed = experiment.parse(tiny.config(steps=4))
    task = dataclasses.replace(parsed.task, verifier=tasks.HostVerifier(dict), splits={"train": [
        dataclasses.replace(one, fields={"first": one.text[0]}) for one in parsed.task.splits["train"]]})
    phase = dataclasses.replace(parsed.phases[0], scale=dataclasses.replace(parsed.phases[0].scale, program="split"))
    one = loop.PhaseLoop(phase, task, Network(parsed.shape), workers=Scorer())
    state = one.initial_state(jax.random.key(0))
    ticks = []
    for tick in one.ticks(state, one.stream(0)):
        ticks.append((tick.done, set(np.asarray(tick.experience.version).tolist()), tick.pending is not None,
                      tick.data["position"]["next_index"], float(tick.metrics["policy/kl_rollout"])))
    assert [done for done, *_ in ticks] == [1, 2, 3, 4]
    assert [version for _, version, *_ in ticks] == [{0}, {0}, {1}, {2}]
    assert [pending for _, _, pending, *_ in ticks] == [True, True, True, False]
    assert [position for *_, position, _ in ticks] == [2, 3, 4, 4]
    assert set(one.compiled) == {"draw", "learn"}


def test_only_the_newest_steps_of_a_run_are_there(run):
    with checkpoint.Checkpoints(run[0], keep_last=9, keep_best=1, keep_steps=(2, 6)) as saved:
        assert saved.steps() == [1, 2, 3, 4, 5, 6] and saved.cursor(3)["phase"] == 1 and saved.cursor(2)["done"] == 2
