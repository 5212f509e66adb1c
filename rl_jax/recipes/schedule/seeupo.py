"""SeeUPO: a conversation's turns are learned one after the other, the last one first."""
from rl_jax.advantage import batch, group
from rl_jax.loss import divergence, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, Turns, recipe
from rl_jax.schedule import turns as carry
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2602.06554", confidence="secondary",
        title="SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees",
        note="A turn whose credit does not vary keeps it as it is: a choice.")
def seeupo(group_size: int = 8, turns: int = 10, clip_low: float = 3e-4, clip_high: float = 4e-4, band: float = 0.2,
           beta: float = 0.002) -> Recipe:
    """GSPO per turn in reverse order, each step weighing answers by how far the later turns' steps moved them.

    Args:
      group_size: samples per prompt, at least 2.
      turns: most turns of an answer; turns beyond are not learned from.
      clip_low, clip_high: half-widths of the turn's ratio's band, below and above 1.
      band: half-width of the carried ratio's band around 1.
      beta: weight of the KL to the reference (k3).
    """
    def loss(policy, x):
        s = ratio.per_sequence_token(policy.logp, x.old_logp, x.mask)
        away = divergence.k3(policy.logp, x.reference_logp)
        return gate.ppo_clip(s, x.advantage, clip_low, clip_high) + beta * away, {"loss/kl": away}

    def factor(carried, logp, old_logp, mask):
        return carry.carried_ratio(carried, logp, old_logp, mask, band)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: batch.zscore_per_turn(group.centred(x.reward, x.group), x.turn, x.mask, turns),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(turns=Turns(tuple(reversed(range(turns))), factor)),
        models=("old", "reference"))
