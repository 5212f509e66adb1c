"""RLOO: REINFORCE, each answer's baseline being the mean reward of the others to the same prompt."""
from rl_jax.advantage import group
from rl_jax.loss import score
from rl_jax.recipe import Recipe, Rollout, recipe
from rl_jax.reward import combine
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2402.14740", confidence="verified",
        title="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs")
def rloo(group_size: int = 4, beta: float = 0.0) -> Recipe:
    """-(R_i - mean of the other R) log p of the answer, with the KL inside R.

    Args:
      group_size: samples per prompt, at least 2.
      beta: reward units per nat of divergence from the reference; 0 runs no reference.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, "REINFORCE Leave-One-Out".
    """
    def reward(x):
        return combine.less_divergence(x.score, x.rollout_logp, x.reference_logp, x.mask, beta)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        reward=reward if beta > 0 else None,
        advantage=lambda x: group.leave_one_out(x.reward, x.group),
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: aggregate.sequence_mean_token_sum(x.mask),
        models=("reference",) if beta > 0 else ())
