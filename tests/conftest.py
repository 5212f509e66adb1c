"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and refuse silent broadcasting."""
import gc
import os
from importlib.metadata import version

# The suite compiles more than it computes. Without fusion emitters jaxlib 0.10 compiles twice as fast; 0.11 lacks the flag.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402  (after the choice of platform)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects and few cycles


# What takes longest and repeats what a shorter test shows for one case: CI runs it with -m slow, beside the suite.
SLOW = (
    "tests/ends/test_notebooks.py::test_it_runs",
    "tests/ends/test_bad_input.py::test_a_corrupt_checkpoint_is_refused_and_the_run_continues_without_it",
    "tests/ends/test_bad_input.py::test_a_verifier_s_fault_is_a_counted_failure[raises-split]",
    "tests/ends/test_bad_input.py::test_a_verifier_s_fault_is_a_counted_failure[gives_nan-split]",
    "tests/ends/test_bad_input.py::test_a_verifier_s_fault_is_a_counted_failure[hangs-split]",
    "tests/ends/test_bad_input.py::test_when_every_answer_fails_nothing_is_learned[split]",
    "tests/ends/test_compare.py::test_stopped_between_steps_it_keeps_what_is_finished",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/gsm8k/llama3_grpo.py]",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/gsm8k/qwen3_grpo.py]",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/gsm8k/qwen3_int8_tis.py]",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/meshes/addmod.py]",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/quickstart.py]",
    "tests/ends/test_configs.py::test_at_toy_size_two_recipes_are_compared_once[configs/compare/chain.py]",
    "tests/ends/test_published.py::test_a_run_with_adapters_goes_on_where_it_stopped",
    "tests/ends/test_resume.py",
    "tests/kernels_pallas/test_decode_attention.py::test_contract[split-plain",
    "tests/kernels_pallas/test_decode_attention.py::test_contract[walk-plain",
    "tests/kernels_pallas/test_decode_attention.py::test_contract_in_bfloat16",
    "tests/kernels_pallas/test_linear_logprob_sharded.py",
    "tests/kernels_pallas/test_linear_policy_loss.py::test_under_vmap_and_scan",
    "tests/kernels_pallas/test_linear_statistics.py::test_contract",
    "tests/kernels_pallas/test_policy_gate_stages.py::test_stages_have_the_loss_and_metrics_of_the_whole",
    "tests/learner/test_ask.py::test_without_learning_the_first_answers_are_those_of_a_whole_rollout",
    "tests/learner/test_ask.py::test_groups_grow_together",
    "tests/learner/test_carry.py::test_steps_in_one_dispatch_and_replicas_are_single_steps",
    "tests/learner/test_carry.py::test_stopped_and_continued_is_as_if_never_stopped",
    "tests/learner/test_lengths.py::test_whatever_else_the_networks_are_asked[experts",
    "tests/learner/test_lengths.py::test_whatever_else_the_networks_are_asked[moments",
    "tests/learner/test_routes.py::test_a_step_with_replay_learns_and_reports_the_load[2]",
    "tests/learner/test_routes.py::test_replicas_and_a_critic_run_on_mixtures",
    "tests/learner/test_step.py::test_every_device_asks_the_host_about_its_own_rows",
    "tests/learner/test_token_tree.py::test_dapo",
    "tests/learner/test_token_tree.py::test_ppo_before_its_critic_has_learnt",
    "tests/learner/test_update.py::test_microbatches_change_nothing[group]",
    "tests/models/test_transformer.py::test_the_shared_prefix_changes_nothing[no_sharing",
    "tests/models/test_transformer.py::test_the_shared_prefix_changes_nothing[query_norm",
    "tests/recipes/test_lengths.py::test_and_so_for_all_others",
    "tests/rollout/test_window.py::test_three_windows_are_one_draw[2-t",
    "tests/test_benchmark.py::test_every_op_is_measured",
    "tests/test_benchmark_step.py::test_growth_is_measured",
    "tests/train/test_compare.py::test_a_host_verifier_scores_its_replicas_in_turn",
    "tests/train/test_compare.py::test_all_start_from_the_weights_that_were_made_once",
    "tests/train/test_compare.py::test_answers_that_were_asked_to_replace_others_are_counted",
    "tests/train/test_meshes.py::test_what_is_kept_on_the_host_changes_nothing",
    "tests/train/test_session.py::test_another_tokenizer_is_refused_on_resume",
    "tests/train/test_session.py::test_replacing_rejected_groups_runs",
    "tests/train/test_session.py::test_several_steps_per_call_and_replicas",
    "tests/train/test_session.py::test_skips_are_counted_across_a_resume",
    "tests/train/test_session.py::test_steps_per_call_changes_no_number",
    "tests/train/test_session.py::test_stopped_and_continued_is_as_if_never_stopped[2]",
    "tests/train/test_session.py::test_stopped_and_continued_is_as_if_never_stopped[9]",
    "tests/train/test_session.py::test_two_seeds_are_two_runs",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what is in SLOW."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Thousands of programs would hold gigabytes by the end of the suite."""
    yield
    jax.clear_caches()
