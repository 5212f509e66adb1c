"""MiniRL: REINFORCE on group-centred rewards, corrected for the engine that sampled and gated as PPO's clip does."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, importance


@recipe(paper="arXiv:2512.01374", confidence="secondary",
        title="Stabilizing Reinforcement Learning with LLMs: Formulation and Practices",
        note="Of a network that mixes experts the update replays those chosen when sampling (routing=\"rollout\", R3) or by "
             "the training engine before it (\"old\", R2); a dense one has nothing to replay. The paper finds R2 best with "
             "two minibatches and R3 from four. Tokens are summed: the step grows with length.")
def minirl_routing_replay(group_size: int = 8, clip_low: float = 0.2, clip_high: float = 0.27, ceiling: float = 5.0,
                          epochs: int = 1, minibatches: int = 2, routing: str = "old") -> Recipe:
    """-constant(M min(old / rollout, ceiling) r) (R - group mean) log p, token sums, M = 0 where PPO's clip stops.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the band of r, the probability now over that before the batch.
      ceiling: the largest weight for what the engine sampled differently.
      epochs, minibatches: passes over the batch, optimiser steps per pass.
      routing: which experts are replayed, "free", "rollout" or "old" (`Recipe.routing`).

    Source: Zheng et al. 2025, arXiv:2512.01374, as in third-party accounts that agree.
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.old_logp)
        return score.policy_gradient(policy.logp, importance.gated_advantage(r, x.advantage, clip_low, clip_high))

    def weighting(x):
        weight = importance.per_token(x.old_logp, x.rollout_logp, x.mask)
        return aggregate.sequence_mean_token_sum(x.mask) * importance.truncated(weight, ceiling)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group), loss=loss, weighting=weighting,
        schedule=Schedule(epochs, minibatches), models=("old",), routing=routing)
