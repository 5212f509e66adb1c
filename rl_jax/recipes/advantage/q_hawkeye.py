"""Q-Hawkeye: prompts whose answers predict different numbers teach less, and the answer must depend on the prompt."""
from rl_jax.advantage import group, shaping
from rl_jax.loss import divergence, gate, perception, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.rollout import perturb
from rl_jax.schedule import cosine
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2601.22920", confidence="verified",
        title="Q-Hawkeye: Reliable Visual Policy Optimization for Image Quality Assessment",
        note="Degrades text by replacing tokens, where the paper degrades images; gamma falls over 5 epochs there. "
             "Its predictions run from 1 to 5, ours as scores do. Its optional likelihood terms are left out.")
def q_hawkeye(group_size: int = 4, alpha: float = 0.2, beta: float = 0.04, gamma: float = 1e-4, batches: int = 1000,
              share: float = 0.5, prediction: str = "", lowest: float = 0.0, highest: float = 1.0) -> Recipe:
    """REINFORCE with exp(-alpha u) z-score, u the spread of predictions, beta k3, less gamma k3 to a degraded prompt.

    Args:
      group_size: samples per prompt, at least 2.
      alpha: how much disagreement among an answer's group takes off its credit.
      beta: weight of k3 to the reference, per nat.
      gamma: first weight of the divergence from the degraded prompt, per nat; falls to 0 along a cosine.
      batches: over how many batches it falls.
      share: of the prompt's tokens, how many are replaced in its degraded form.
      prediction: name of the verifier's part that is predicted; "" is the score itself.
      lowest, highest: range of the predictions.

    Source: Xie et al. 2026, arXiv:2601.22920, with the published code, github.com/AMAP-ML/Q-Hawkeye.
    """
    def advantage(x):
        credit = group.zscore(x.reward, x.group, epsilon=1e-4)
        named = x.parts[prediction] if prediction else x.score
        return shaping.discounted_by_uncertainty(credit, named, x.group, alpha, lowest, highest)

    def loss(policy, x):
        surrogate = gate.unclipped(ratio.per_token(policy.logp, policy.logp), x.advantage)
        return {"policy": surrogate + beta * divergence.k3(policy.logp, x.reference_logp),
                "perception": perception.gap(policy.logp, x.view.degraded, x.coefficient.gamma)}

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2), advantage=advantage, loss=loss,
        weighting=lambda x: {"policy": aggregate.sequence_mean_token_mean(x.mask),
                             "perception": aggregate.token_mean(x.mask)},
        schedule=Schedule(controls={"gamma": cosine.annealed(gamma, 0.0, batches)}), models=("reference",),
        views={"degraded": lambda prompts, seed: perturb.token_noise(prompts, seed, share)})
