"""APO: good answers to hard prompts are held less near to the reference, wrong answers that ramble pushed harder."""
from rl_jax.advantage import group, shaping
from rl_jax.loss import difficulty, divergence, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2506.21655", confidence="verified",
        title="APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization")
def apo_asymmetric(group_size: int = 8, clip: float = 0.2, beta: float = 1e-3, rate: float = 2.718281828459045,
                   base: float = 1.00001, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Clipped ratio times z-score, stretched for long wrong answers, plus kappa beta k3 with kappa by difficulty.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      beta: weight of k3 where kappa is 1, per nat.
      rate: kappa = 1 - exp(-rate p) for good answers, p the share of correct ones; infinite makes it 1.
      base: a wrong answer d tokens too long counts 2 - base^-d; 1 changes nothing.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Hong et al. 2025, arXiv:2506.21655, with the published code, github.com/Indolent-Kawhi/View-R1.
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        return {"policy": gate.ppo_clip(r, x.advantage, clip, clip),
                "kl": beta * divergence.k3(policy.logp, x.reference_logp)}

    def zscore(x):
        return group.zscore(x.reward, x.group, epsilon=1e-9)

    def weighting(x):
        kappa = difficulty.divergence_weight(zscore(x), x.score, x.group, rate=rate)
        return {"policy": aggregate.token_mean(x.mask),
                "kl": kappa[:, None] * aggregate.sequence_mean_token_mean(x.mask)}

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: shaping.stretched_by_length(zscore(x), x.score, x.group, x.mask, base=base),
        loss=loss, weighting=weighting, schedule=Schedule(epochs, minibatches), models=("reference",))
