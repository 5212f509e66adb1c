"""ETR: GRPO whose clip is wider for answers of clear credit and for prompts whose answers disagree."""
from rl_jax.advantage import group
from rl_jax.loss import divergence, elastic, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2601.03723", confidence="reconstructed",
        title="ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization",
        note="The abstract gives no formula: tanh, the product and all numbers are choices. "
             "`elastic.by_outcome_centred` also narrows the clip for weak credit.")
def etr(group_size: int = 8, clip: float = 0.2, micro: float = 0.5, macro: float = 0.5, highest: float = 1.0,
        beta: float = 0.04, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """GRPO with the half-width clip (1 + micro tanh|A|) (1 + macro v), v the group's reward variance over the largest.

    Args:
      clip: half-width of the ratio's band for A = 0 and v = 0.
      micro, macro: how much the width grows with |A| and with v; 0 and 0 is GRPO.
      highest: rewards are in [0, highest]. The rest is as in GRPO.

    Source: Zhang et al. 2026, arXiv:2601.03723, abstract.
    """
    def loss(policy, x):
        spread = elastic.spread(x.reward, x.group, highest=highest)
        low, high = elastic.by_outcome(x.advantage, spread, clip, clip, micro=micro, macro=macro)
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, low, high)
        return clipped + beta * divergence.k3(policy.logp, x.reference_logp) if beta > 0 else clipped

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss, weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches), models=("reference",) if beta > 0 else ())
