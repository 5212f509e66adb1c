"""Every mistake in a config is an error before anything compiles, and says what is allowed."""
import json

import ml_collections
import pytest

from rl_jax import experiment, sections
from rl_jax.learner.optimiser import Optimiser
from tests.ends import tiny

HOST = {"task": "reasoning_gym", "task_args": {
    "generator": "chain_sum", "keep_after": ": ", "prompt_length": 16, "completion_length": 6, "train_size": 8,
    "validation_size": 4, "held_out_size": 4,
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}


def changed(change, **given):
    """A tiny config's plain values after a change to them."""
    values = sections.plain(tiny.config(**given))
    change(values)
    return values


def put(path, value):
    """A change: config.<path> = value."""
    def change(values):
        *front, last = path.split(".")
        for part in front:
            values = values[int(part)] if part.isdigit() else values[part]
        values[last] = value

    return change


def test_a_config_becomes_typed_values():
    found = experiment.parse(tiny.config(warm_start=3, steps=7, recipe="baselines.grpo", optimiser={"decay": "linear"}))
    assert [phase.recipe.name for phase in found.phases] == ["sft", "grpo"]
    assert [phase.scale.steps for phase in found.phases] == [3, 7]
    assert found.phases[1].recipe.group_size == 2 and found.phases[0].recipe.group_size == 1
    assert found.shape.vocabulary == found.task.tokenizer.size and found.shape.width == 16
    assert found.phases[1].optimiser == Optimiser(learning_rate=1e-2, decay="linear") and found.run.trackers == ()


def test_json_and_back_is_the_same_experiment():
    config = tiny.config(warm_start=3)
    again = experiment.parse(json.loads(json.dumps(sections.plain(config))))
    first = experiment.parse(config)
    assert (again.shape, again.run, again.task.fingerprint) == (first.shape, first.run, first.task.fingerprint)
    assert [(p.optimiser, p.scale, p.recipe.hyperparameters) for p in again.phases] == [
        (p.optimiser, p.scale, p.recipe.hyperparameters) for p in first.phases]


def test_updates_and_prompts_are_counted():
    phase = experiment.parse(tiny.config(recipe="baselines.ppo", steps=5, recipe_args={"epochs": 3, "minibatches": 2})
                             ).phases[0]
    assert phase.updates == 5 * 3 * 2 and phase.prompts_asked == 4
    phase = experiment.parse(tiny.config(recipe="loss.dapo_decoupled_clip", recipe_args={"resample": 2})).phases[0]
    assert phase.prompts_asked == 4 * 3


UNKNOWN = [("optimizer", "config", "optimiser"), ("run.sead", "config.run", "seed"),
           ("scale.step", "config.scale", "steps_per_call"), ("model.depth", "config.model", "layers"),
           ("model.features.biased", "config.model", "query_bias"), ("recipe.args.clip", "config.recipe.args", "baseline"),
           ("task.args.modulo", "config.task.args", "modulus"), ("optimiser.lr", "config.optimiser", "learning_rate"),
           ("before.0.scale.stepz", "config.before[0].scale", "steps"), ("before.0.model", "config.before[0]", "scale")]


@pytest.mark.parametrize("path, where, allowed", UNKNOWN, ids=lambda v: v if "." in v else "")
def test_an_unknown_field_is_named_with_the_allowed_ones(path, where, allowed):
    with pytest.raises(ValueError) as refusal:
        experiment.parse(changed(put(path, 1), warm_start=2))
    said = str(refusal.value)
    assert f"{where} has no field {path.rsplit('.', 1)[-1]!r}" in said and allowed in said.split("allowed are")[1]


@pytest.mark.parametrize("section", ["task", "model", "recipe", "optimiser", "scale", "run"])
def test_a_missing_section_is_named(section):
    with pytest.raises(ValueError, match=f"config lacks '{section}'"):
        experiment.parse(changed(lambda values: values.pop(section)))


WRONG = [("run.seed", 1.5, "int"), ("run.seed", True, "int"), ("run.seed", "1", "int"), ("scale.steps", 10.0, "int"),
         ("optimiser.learning_rate", "1e-4", "float"), ("optimiser.learning_rate", float("nan"), "float"),
         ("optimiser.decay", 3, "str"), ("model.remat", 1, "bool"), ("model.width", None, "int"),
         ("model.features.tied", "yes", "bool"), ("run.trackers", "wandb", "tuple"), ("task.args.modulus", 2.5, "int"),
         ("recipe.args.baseline", "0", "float"), ("recipe.args.group_size", [2], "int")]


@pytest.mark.parametrize("path, value, kind", WRONG, ids=lambda v: str(v))
def test_a_wrong_type_is_refused_with_the_right_one(path, value, kind):
    with pytest.raises(ValueError, match=rf"config\.{path.replace('model.features', 'model')}=.*allowed is {kind}"):
        experiment.parse(changed(put(path, value)))


@pytest.mark.parametrize("value", [[1], "x", 3])
def test_options_of_a_generator_are_a_mapping(value):
    with pytest.raises(ValueError, match=r"config\.task\.args\.options=.*Mapping.* or NoneType"):
        experiment.parse(changed(put("task.args.options", value), **HOST))


def test_an_integer_is_a_float_and_a_list_a_tuple():
    found = experiment.parse(changed(lambda values: [put("optimiser.learning_rate", 1)(values),
                                                     put("run.trackers", ["wandb"])(values)]))
    rate = found.phases[0].optimiser.learning_rate
    assert rate == 1.0 and type(rate) is float and found.run.trackers == ("wandb",)


SPLIT = {**HOST, "program": "split"}
AHEAD = {"program": "async"}
TOGETHER = [
    *[({}, f"run.{name}", low - 1, f"config.run.{name}={low - 1}: must be at least {low}") for name, low in {
        "checkpoint_every": 1, "keep_last": 1, "keep_best": 0, "validate_every": 0, "validation_prompts": 1,
        "validation_samples": 1, "shown_groups": 0, "workers": 1, "seed": 0}.items()],
    *[({}, f"scale.{name}", 0, f"scale.{name}=0: must be at least 1") for name in (
        "steps", "prompts_per_step", "microbatches", "steps_per_call", "seeds")],
    ({**HOST, "mesh": {"sequence": 16}}, "scale.steps", 4, "8 answers per step cannot be dealt to the verifiers of 16 devices"),
    ({}, "optimiser.stop_after_skips", 0, "stop_after_skips=0: must be at least 1"),
    ({}, "scale.draw_with", "int3", "int3.*allowed are .*fp8.*int8"),
    ({"recipe": "baselines.sft"}, "scale.draw_with", "int8", "draws no answers"),
    ({}, "run.trackers", ["mlflow"], "config.run.trackers=.*mlflow.*allowed are .*tensorboard"),
    ({}, "run.trackers", [["wandb"]], "config.run.trackers="),
    ({"task_args": {"validation_size": 0}}, "run.validate_every", 2, "no validation split.*validate_every=0"),
    ({"warm_start": 2}, "scale.seeds", 2, "scale.seeds differ between phases"),
    ({}, "scale.microbatches", 3, "prompts_per_step=4 cannot be cut .* make it a multiple of 3"),
    ({"recipe": "baselines.ppo"}, "recipe.args.minibatches", 3, "3 minibatches x 1 microbatches"),
    ({}, "scale.program", "three", r"scale.program='three': allowed are \('one', 'split', 'async'\)"),
    (HOST, "scale.seeds", 2, "scale.seeds=2 needs a task with a pure verifier"),
    ({"run": {"validate_every": 2}}, "scale.seeds", 2, "run.validate_every=0"),
    ({}, "scale.steps_per_call", 3, "steps=4 must be a multiple of scale.steps_per_call=3"),
    ({"steps": 6}, "scale.steps_per_call", 3, "checkpoint_every=2 must be a multiple"),
    ({"steps": 6, "run": {"checkpoint_every": 6, "validate_every": 2}}, "scale.steps_per_call", 3, "validate_every=2"),
    ({}, "scale.program", "split", 'the host has nothing to score: set program="one"'),
    ({"recipe": "baselines.sft", **HOST}, "scale.program", "split", "nothing to score"),
    ({"recipe": "loss.dapo_decoupled_clip", **HOST}, "scale.program", "split", "rollout.resample=2"),
    ({"recipe": "rollout.t_ppo", **HOST}, "scale.program", "split", "rollout.window=2"),
    ({"recipe": "loss.fiberpo_domain", "recipe_args": {"minibatches": 1}}, "scale.microbatches", 2, "all groups of a batch"),
    ({"recipe": "advantage.oblr_po"}, "scale.prompts_per_step", 3, "gradient's noise is estimated from: .* multiple of 2"),
    ({**SPLIT, "steps": 4}, "scale.steps_per_call", 2, "steps_per_call=1 and seeds=1"),
    ({"recipe": "baselines.sft"}, "scale.program", "async", 'learns from given ones: set program="one"'),
    ({"recipe": "loss.dapo_decoupled_clip"}, "scale.program", "async", "async.*cannot replace.*rollout.resample=2"),
    ({"recipe": "rollout.t_ppo"}, "scale.program", "async", "async.*rollout.window=2"),
    ({"recipe": "loss.r2vpo"}, "scale.program", "async", "async.*bounds the age.*rollout.replay=1 keeps it"),
    ({**AHEAD, "recipe": "baselines.grpo"}, "scale.seeds", 2, "async.*steps_per_call=1 and seeds=1"),
    ({}, "asynchronous", {"staleness": 2}, "config.asynchronous is read .* leave the section out"),
    *[(AHEAD, "asynchronous", {name: low - 1}, f"config.asynchronous.{name}={low - 1}: must be at least {low}")
      for name, low in {"staleness": 0, "sampler_devices": 0, "sampler_tensor": 1}.items()],
    (AHEAD, "asynchronous", {"order": "any"}, "order='any': allowed are .*fixed.*eager"),
    (AHEAD, "asynchronous", {"lag": 1}, "no field 'lag'; allowed are staleness, order, sampler_devices, sampler_tensor"),
    (AHEAD, "asynchronous", {"sampler_devices": 3, "sampler_tensor": 2}, "sampler_tensor=2 does not divide sampler_devices=3"),
    (AHEAD, "asynchronous", {"sampler_devices": 2, "sampler_tensor": 2}, "sampler_tensor=2 does not divide .*key_heads=1"),
    (AHEAD, "asynchronous", {"sampler_devices": 3}, "prompts_per_step=4 cannot be cut over the 3 devices of the sampler"),
    ({}, "batching", {"slots": -1}, "config.batching.slots=-1: must be at least 0"),
    ({"recipe": "baselines.grpo"}, "batching", {"slots": 9}, "'grpo' draws .* = 8 answers: take no more slots than answers"),
    ({"recipe": "baselines.sft"}, "batching", {"slots": 2}, "slots=2 .*no phase draws any: set it to 0"),
    ({"recipe": "rollout.t_ppo"}, "batching", {"slots": 2}, "slots=2: recipe 't_ppo' draws in windows"),
    ({"mesh": {"data": 2}}, "batching", {"slots": 2}, "slots=2: a mesh of 2 devices"),
    ({"recipe": "baselines.grpo"}, "recipe.args.group_size", 1, r"config.recipe \(baselines.grpo\): group_size=1.*>= 2"),
    ({"recipe": "baselines.rloo"}, "recipe.args.group_size", 1, "group_size >= 2"),
    ({"recipe": "loss.dapo_decoupled_clip"}, "recipe.args.group_size", 1, "group_size >= 2"),
    ({"recipe": "loss.dapo_decoupled_clip"}, "recipe.args.resample", -1, "resample=-1: allowed are .*resample >= 0"),
    *[({}, "batching", {name: low - 1}, f"config.batching.{name}={low - 1}: must be at least {low}")
      for name, low in {"slots": 0, "length_buckets": 1, "packed_rows": 0}.items()],
    ({}, "batching", {"buckets": 2}, "no field 'buckets'; allowed are slots, length_buckets, packed_rows"),
    ({}, "batching", {"length_buckets": 9}, "length_buckets=9, and answers of .* take at most"),
    ({}, "batching", {"packed_rows": 2}, "packed_rows=2 leaves nothing to pack, .* has 2 answers"),
    ({"seeds": 2}, "batching", {"length_buckets": 2}, "length_buckets=2: scale.seeds=2 .* or seeds=1"),
    ({"seeds": 2}, "batching", {"packed_rows": 1}, "packed_rows=1: scale.seeds=2 .* or seeds=1"),
    ({"mesh": {"fsdp": 2}}, "batching", {"packed_rows": 1}, "packed_rows=1: .* on one device: .* config.mesh to 1"),
    ({}, "optimiser.decay", "exponential", "allowed are .*cosine"), ({}, "optimiser.learning_rate", -1.0, "positive"),
    ({}, "model.key_heads", 3, "key_heads must divide heads"), ({}, "model.head_size", 7, "even number"),
    ({}, "model.layers", 0, "layers=0: must be at least 1"), ({}, "model.compute", "float16", "allowed are .*bfloat16"),
    ({}, "task.args.modulus", 1, r"config.task \(toys.addmod\): modulus=1"),
    (HOST, "task.args.generator", "chain_sun", "chain_sum"), (HOST, "task.args.options", {"terms": 2}, "min_terms"),
    (HOST, "task.args.prompt_length", 2, "prompt_length"), (HOST, "task.args.train_size", 0, "train_size >= 1"),
]


@pytest.mark.parametrize("given, path, value, said", TOGETHER, ids=[f"{p}={v}" for _, p, v, _ in TOGETHER])
def test_an_impossible_combination_is_refused_with_a_way_out(given, path, value, said):
    with pytest.raises(ValueError, match=said):
        experiment.parse(changed(put(path, value), **given))


def test_slots_are_refused_on_the_samplers_own_mesh():
    values = changed(put("asynchronous", {"sampler_devices": 2}), **AHEAD)
    with pytest.raises(ValueError, match="slots=2: a mesh of 2 devices .*sampler_devices to 1 at most"):
        experiment.parse({**values, "batching": {"slots": 2}})


def test_the_phase_is_named():
    with pytest.raises(ValueError, match=r"phase 2 of 2 \(reinforce\): scale.steps=0"):
        experiment.parse(changed(put("scale.steps", 0), warm_start=2))
    with pytest.raises(ValueError, match=r"phase 1 of 2 \(sft\): scale.steps=0"):
        experiment.parse(changed(put("before.0.scale.steps", 0), warm_start=2))


@pytest.mark.parametrize("path, value, command", [
    ("recipe.name", "baselines.grpo", "recipe.*--config=FILE.py:baselines.grpo"),
    ("task.name", "toys.chain", "task.*--config=FILE.py:toys.chain")])
def test_a_name_changed_alone_is_refused_with_the_command(path, value, command):
    with pytest.raises(ValueError, match=f"args are those of .*{command}"):
        experiment.parse(changed(put(path, value)))


@pytest.mark.parametrize("kind, near", [("recipe", "baselines.grpo"), ("task", "toys.addmod")])
def test_an_unknown_name_is_answered_with_those_there_are(kind, near):
    with pytest.raises(ValueError) as refusal:
        experiment.parse(changed(put(f"{kind}.name", near[:-1] + "x")))
    said = str(refusal.value)
    assert f"unknown {kind}" in said and f"Did you mean {near!r}" in said
    for other in ("baselines.sft", "loss.dapo_decoupled_clip") if kind == "recipe" else ("toys.chain", "reasoning_gym"):
        assert other in said.split("Allowed are")[1]


def test_names_are_factories_and_nothing_else():
    assert "baselines.ppo" in sections.names("rl_jax.recipes")
    tasks = sections.names("rl_jax.tasks")
    assert {"toys.addmod", "toys.bandit", "toys.chain", "toys.evens", "toys.token_tree", "reasoning_gym", "gsm8k"} == set(tasks)


@pytest.mark.parametrize("make, said", [
    (lambda: experiment.recipe_section("baselines.grpo", cilp=0.1), r"no argument \['cilp'\]; it has .*'clip'"),
    (lambda: experiment.task_section("reasoning_gym"), r"needs \['generator'\]"),
    (lambda: experiment.model_section(depth=3), r"model has no \['depth'\]; allowed are .*'layers'")])
def test_a_config_file_is_told_its_mistakes(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("override, said", [
    ("--config.optimiser.lr=1", "config.optimiser has no field 'lr'; allowed are .*learning_rate"),
    ("-config.optimiser.lr=1", "config.optimiser has no field 'lr'"),
    ("--config.optimizer.learning_rate=1", "config has no field 'optimizer'; allowed are .*optimiser"),
    ("--config.scale.steps.more=1", "config.scale.steps has no field 'more'; allowed are none: it is a plain value"),
    ("--config.before[0].scale.stepz=1", r"config.before\[0\].scale has no field 'stepz'; allowed are .*steps"),
    ("--config.before[1].scale.steps=1", r"config.before has 1 entries, no \[1\]"),
    ("--config.before.first.scale.steps=1", r"config.before has 1 entries, no \[first\]")])
def test_a_misnamed_override_is_answered_with_the_fields_there_are(override, said):
    given = ["train.py", "--config=x.py", "--config.scale.steps=3", override]
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(sections.misnamed(tiny.config(warm_start=1), given))


def test_rightly_named_overrides_are_not_misnamed():
    given = ["--config.scale.steps=3", "--config.before[0].optimiser.learning_rate=1", "--workdir=config.x", "config.y"]
    assert sections.misnamed(tiny.config(warm_start=1), given) is None


def test_a_config_is_locked_and_has_few_fields_per_section():
    config = tiny.config()
    with pytest.raises(AttributeError):
        config.scale.step = 3
    with pytest.raises(TypeError):
        config.scale.steps = "many"
    assert set(config) - {"before"} == {"task", "model", "recipe", "optimiser", "scale", "run"}
    for name in ("model", "optimiser", "scale", "run"):
        assert len(config[name]) <= 10, name
    assert isinstance(config.recipe.args, ml_collections.ConfigDict)
