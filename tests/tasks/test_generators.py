import pickle
import sys

import pytest

from rl_jax.tasks import generators


def test_items_come_from_consecutive_seeds():
    """Item i is drawn from Random(seed + i): datasets one seed apart share all but one question."""
    near, far = (generators.dataset("chain_sum", {}, seed=seed, size=20) for seed in (7, 8))
    assert [near[i + 1]["question"] for i in range(19)] == [far[i]["question"] for i in range(19)]


def test_every_generator_is_there_by_name():
    from reasoning_gym import factory

    assert len(factory.DATASETS) > 100
    for name in ("chain_sum", "gcd", "letter_counting", "countdown", "syllogism"):
        assert generators.dataset(name, {}, seed=0, size=1)[0]["question"]


@pytest.mark.parametrize("generator, options, named", [
    ("nothing", {}, "'chain_sum'"), ("chain_sum", {"terms": 3}, r"\['terms'\].*'max_terms'"),
    ("chain_sum", {"min_terms": 0}, "min_terms must be positive"), ("chain_sum", {"seed": 1}, r"\['seed'\]")])
def test_unknown_names_and_options(generator, options, named):
    with pytest.raises(ValueError, match=named):
        generators.dataset(generator, options, seed=0, size=1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install rl_jax\[tasks\]"):
        generators.dataset("chain_sum", {}, seed=0, size=1)


@pytest.mark.parametrize("partial_credit, score", [(False, 0.0), (True, 0.01)])
def test_partial_credit_is_no_score_unless_asked_for(partial_credit, score):
    """The Countdown scorer gives 0.01 for an expression of the given numbers with another value."""
    entry = generators.dataset("countdown", {}, seed=0, size=1)[0]
    wrong = " + ".join(map(str, entry["metadata"]["numbers"]))
    scorer = pickle.loads(pickle.dumps(generators.Scorer("countdown", {}, partial_credit)))
    said = scorer(entry, wrong)
    assert 0 < said["partial_credit"] < 1
    assert said["score"] == (said["partial_credit"] if partial_credit else 0.0)
    assert scorer(entry, f" {entry['answer']}\n") == {"score": 1.0, "partial_credit": 1.0}
