"""HAPO: a token's entropy decides its temperature, its share of the credit and which side of the clip gives way."""
from rl_jax.advantage import tokenwise
from rl_jax.loss import bounds, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.reward import length
from rl_jax.schedule import entropy_statistics as entropies
from rl_jax.selection import outcome
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.16591", confidence="verified", note="Sure tokens get the sign the paper says, not the code.",
        title="From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature")
def hapo_heterogeneous(group_size: int = 16, clip_low: float = 0.2, clip_high: float = 0.2, quantile: float = 0.8,
                       tau: float = 0.05, beta: float = 1.0, alpha: float = 1.0, z_max: float = 5.0, resample: int = 2,
                       limit: int = 20480, buffer: int = 4096, ceiling: float = 10.0, minibatches: int = 1) -> Recipe:
    """DAPO with token-level z-scores; temperature, credit and clip depend on each token's entropy.

    Args:
      quantile, z_max: share of sure tokens; |z| from which on a group is compared by answers (0: always).
      tau, beta, alpha: how much entropy changes temperature, credit and the ratio's band; 0 is off.
      ceiling: largest ratio that counts for negative credit. The rest is as in DAPO.
    """
    def loss(policy, x):
        r, h = ratio.per_token(policy.logp, x.old_logp), x.mark.scaled_entropy
        low, high = bounds.by_entropy(h, clip_low, clip_high, alpha)
        return gate.dual_clip(r, tokenwise.redistributed(x.advantage, r, h, low, high, beta), low, high, ceiling)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2, resample=resample,
                        temperature_factor=lambda entropy, c: entropies.temperature_factor(entropy, c.entropies, tau)),
        reward=lambda x: x.score + length.soft_overlong(x.mask, limit, buffer),
        selection=lambda x: outcome.mixed(x.score, x.group),
        advantage=lambda x: tokenwise.zscore(x.reward, x.group, x.mask, limit=z_max),
        marks=lambda x: {"scaled_entropy": entropies.scaled_in_batch(x.rollout_entropy, x.mask, quantile)},
        loss=loss, weighting=lambda x: aggregate.token_mean(x.mask), models=("old",),
        schedule=Schedule(minibatches=minibatches, controls={"entropies": entropies.of_previous_step(quantile)}))
