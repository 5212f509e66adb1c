"""PPO with a dual clip: a bad token that has become probable cannot dominate the batch."""
from rl_jax import masked
from rl_jax.advantage import temporal
from rl_jax.loss import gate, ratio, value
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:1912.09729", confidence="verified",
        title="Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
        note="The paper's dual clip on `baselines.ppo`. TRL's delta (`gate.two_sided_clip`) is the same above the band.")
def ppo_dual_clip(clip: float = 0.2, ceiling: float = 3.0, value_clip: float = 0.5, value_coefficient: float = 1.0,
                  discount: float = 1.0, decay: float = 0.95, epochs: int = 4, minibatches: int = 1) -> Recipe:
    """Clipped ratio times whitened GAE, at most -c A where A < 0, plus the critic's clipped squared error, per token.

    Args:
      clip, ceiling: half-width of the ratio's band; c, the largest ratio that counts where A < 0.
      value_clip, value_coefficient: half-width of the value's band (reward units), weight of the critic's loss.
      discount, decay, epochs, minibatches: gamma and lambda, per token; passes over the batch, steps per pass.

    Source: Ye et al. 2019, arXiv:1912.09729, "Dual-clip PPO"; Schulman et al. 2017, arXiv:1707.06347, eq. 9 and 11.
    """
    def path(x):
        return temporal.at_last_token(x.reward, x.mask), x.values, x.mask, discount, decay

    def loss(policy, x):
        clipped = gate.dual_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip, ceiling)
        error = value.clipped(policy.values, x.values, x.mark.target, value_clip)
        return clipped + value_coefficient * error, {"loss/value": error}

    return Recipe(
        rollout=Rollout(group_size=1),
        advantage=lambda x: masked.whiten(temporal.gae(*path(x)), x.mask),
        marks=lambda x: {"target": temporal.lambda_return(*path(x))},
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches), models=("critic",))
