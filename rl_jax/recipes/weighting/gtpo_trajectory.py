"""GTPO: words that good and bad answers share are not unlearned, and answers drawn in doubt are left out."""
from rl_jax.advantage import group, shaping
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.schedule import first
from rl_jax.selection import entropy
from rl_jax.weighting import aggregate, conflict


@recipe(paper="arXiv:2508.03772", confidence="verified",
        title="GTPO: Trajectory-Based Policy Optimization in Large Language Models",
        note="The paper's form. Its published code always filters, multiplies both runs and divides by the number of "
             "conflict tokens: `entropy.below`, `conflict.factor_per_run`, `conflict.inverse_count`.")
def gtpo_trajectory(group_size: int = 8, boost: float = 2.0, gamma: float = 0.1,
                    threshold: float = 0.6931471805599453) -> Recipe:
    """REINFORCE with A = R - group mean - gamma H, tokens shared by good and bad answers at either end weighed 2 or 0.

    Args:
      group_size: samples per prompt, at least 2.
      boost: how much a conflict token counts in a good answer; in a bad one it counts 0.
      gamma: reward units taken off per nat of the answer's mean entropy.
      threshold: mean entropy above which an answer does not count, in nats; ln 2.

    Source: Simoni et al. 2025, arXiv:2508.03772.
    """
    def weighting(x):
        sure = entropy.below_if_begun_below(x.rollout_entropy, x.mask, x.coefficient.initial_entropy, threshold)
        shared = conflict.factor(x.tokens, group.centred(x.reward, x.group), x.group, x.mask, boost)
        return shared * aggregate.sequence_mean_token_mean(x.mask & sure[:, None])

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: shaping.less_entropy(group.centred(x.reward, x.group), x.rollout_entropy, x.mask, gamma),
        loss=lambda policy, x: gate.unclipped(ratio.per_token(policy.logp, policy.logp), x.advantage),
        weighting=weighting,
        schedule=Schedule(controls={"initial_entropy": first.token_mean(lambda x: x.rollout_entropy)}))
