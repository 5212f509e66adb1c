"""Groups in which some members are given instead of drawn."""
import dataclasses

import jax.numpy as jnp

from rl_jax.types import Prompts, Samples


def with_answers(samples: Samples, prompts: Prompts, count: int) -> Samples:
    """The last `count` samples of each prompt's group replaced with its given answer, where it has one.

    Nobody drew those tokens: their `rollout_logp` is 0 until the learner puts what its weights say of them.

    Args:
      samples: G per prompt, prompt-major.
      prompts: with `answer` and `answer_mask`; a prompt without answer has no True in its mask.
      count: of each group, less than G.

    Raises:
      ValueError: if the prompts carry no answers.
    """
    if prompts.answer is None:
        raise ValueError("this recipe puts given answers into its groups (rollout.given), and the prompts have none: "
                         "take a task whose training examples have an `answer`.")
    rows, group = samples.mask.shape[0], samples.mask.shape[0] // prompts.lengths.shape[0]
    there = jnp.repeat(prompts.answer_mask.any(axis=1), group)
    given = there & (jnp.arange(rows) % group >= group - count)

    def put(drawn, answer):
        return jnp.where(given[:, None], jnp.repeat(answer, group, axis=0), drawn)

    zero = jnp.zeros(prompts.answer.shape, jnp.float32)
    return dataclasses.replace(
        samples, tokens=put(samples.tokens, prompts.answer), mask=put(samples.mask, prompts.answer_mask),
        rollout_logp=put(samples.rollout_logp, zero), rollout_entropy=put(samples.rollout_entropy, zero),
        finished=samples.finished | given, given=given,
        support=None if samples.support is None else jnp.where(
            given[:, None, None], jnp.uint32(0xFFFFFFFF), samples.support))
