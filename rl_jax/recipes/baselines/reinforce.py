"""REINFORCE: the whole answer is one action, made more probable by its reward over a constant baseline."""
from rl_jax.advantage import baseline as baselines
from rl_jax.loss import score
from rl_jax.recipe import Recipe, Rollout, recipe
from rl_jax.weighting import aggregate


@recipe(paper="Williams 1992, Machine Learning 8, doi:10.1007/BF00992696", confidence="verified",
        title="Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning")
def reinforce(group_size: int = 1, baseline: float = 0.0) -> Recipe:
    """-(R - b) log p of the answer.

    Args:
      group_size: samples per prompt; they are not compared with each other.
      baseline: b, in reward units, the same for every answer.

    Source: Williams 1992, Machine Learning 8, section 4.
    """
    return Recipe(
        rollout=Rollout(group_size),
        advantage=lambda x: baselines.constant(x.reward, baseline),
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: aggregate.sequence_mean_token_sum(x.mask))
