"""DAPO: GRPO with a higher upper clip, a token-level mean, only groups that disagree, and a penalty for length."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, recipe
from rl_jax.reward import length
from rl_jax.selection import outcome
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2503.14476", confidence="verified",
        title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale")
def dapo_decoupled_clip(group_size: int = 16, clip_low: float = 0.2, clip_high: float = 0.28, resample: int = 2,
                        limit: int = 20480, buffer: int = 4096) -> Recipe:
    """Clipped ratio times group z-score, mean over all tokens of the batch; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the ratio's band, below and above 1.
      resample: further waves of prompts per step that may replace groups that agree.
      limit, buffer: from which length, in tokens, an answer loses 1, and over how many before that it starts to.

    Source: Yu et al. 2025, arXiv:2503.14476, eq. 8 to 13.
    """
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip_low, clip_high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2, resample=resample),
        reward=lambda x: x.score + length.soft_overlong(x.mask, limit, buffer),
        selection=lambda x: outcome.mixed(x.score, x.group),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask))
