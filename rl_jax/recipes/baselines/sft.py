"""Supervised fine-tuning: given answers become more probable, token by token."""
from rl_jax.loss import supervised
from rl_jax.recipe import Recipe, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2203.02155", confidence="verified",
        title="Training language models to follow instructions with human feedback")
def sft() -> Recipe:
    """Mean negative log-likelihood of the answers' tokens; nothing is drawn.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """
    return Recipe(
        rollout=None,
        loss=lambda policy, x: supervised.negative_log_likelihood(policy.logp),
        weighting=lambda x: aggregate.token_mean(x.mask))
