"""Credit by comparison with all answers to the same prompt, those of earlier steps included."""
import jax
import jax.numpy as jnp

from rl_jax.advantage import group as groups
from rl_jax.types import Group, PerSequence

NONE = {"mean": 0.0, "std": 0.0, "count": 0.0}  # of a prompt that was never asked


def merged(mean: PerSequence, std: PerSequence, earlier_mean: PerSequence, earlier_std: PerSequence,
           earlier: PerSequence) -> tuple[PerSequence, PerSequence]:
    """(mu_tot, sigma_tot) of i = earlier + 1 groups of equal weight, from the new one and those before it.

    mu_tot = ((i - 1) mu_old + mu) / i and sigma_tot^2 = [(i - 1) sigma_old^2 + sigma^2 + (i - 1) / i
    (mu - mu_old)^2] / i: the variance of all rewards where the sigma are with ddof 0 and the groups of
    equal size. With ddof 1, the mean of the groups' variances plus the variance of their means.

    Args:
      mean, std: mu and sigma of the new group, in reward units.
      earlier_mean, earlier_std: mu_old and sigma_old of those before it; not read where there were none.
      earlier: how many there were, i - 1.

    Source: Yang et al. 2025, arXiv:2509.02333, "Smooth advantage standardization".
    """
    uses = earlier + 1
    # written so that a mean which is met again is kept to the last bit
    gap = mean - jnp.where(earlier == 0, mean, earlier_mean)
    spread = jnp.where(earlier == 0, 0.0, earlier * earlier_std**2)
    variance = (spread + std**2 + earlier / uses * gap**2) / uses
    return mean - earlier / uses * gap, jnp.sqrt(variance)


def smoothed(reward: PerSequence, group: Group, mean: PerSequence, std: PerSequence, count: PerSequence) -> PerSequence:
    """The smaller of two mixtures of A_new and A_tot: a group that agrees still teaches where its history differs.

    A_new = (R - mu) / sigma within the group (ddof 1), A_tot = (R - mu_tot) / sigma_tot with all earlier
    groups (`merged`), each 0 where its sigma is 0, both dimensionless. At the prompt's i-th use,
    ((i - 1) A_new + A_tot) / i or (A_new + (i - 1) A_tot) / i, whichever is nearer to 0; the latter if both
    are. At i = 1, A_new. A sequence that is alone in its group is compared with the history only (a choice;
    published code refuses such groups).

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      mean, std: mu_old and sigma_old of the prompt's earlier groups, in reward units.
      count: how many there were, i - 1.

    Source: Yang et al. 2025, arXiv:2509.02333, "Smooth advantage standardization".
    """
    reward, mean, std, count = jax.lax.stop_gradient((reward, mean, std, count))
    mean_now, std_now = groups.mean(reward, group), groups.std(reward, group)
    mean_all, std_all = merged(mean_now, std_now, mean, std, count)
    now = _standardised(reward - mean_now, std_now)
    overall = _standardised(reward - mean_all, std_all)
    share = 1 / (count + 1)
    mostly_now, mostly_overall = (1 - share) * now + share * overall, share * now + (1 - share) * overall
    return jnp.where(jnp.abs(mostly_now) < jnp.abs(mostly_overall), mostly_now, mostly_overall)


def updated(reward: PerSequence, group: Group, mean: PerSequence, std: PerSequence,
            count: PerSequence) -> dict[str, PerSequence]:
    """{mean, std, count} of the prompt's groups up to this one: what `smoothed` wants to know the next time.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      mean, std: of the prompt's groups before this one, in reward units.
      count: how many there were.

    Source: Yang et al. 2025, arXiv:2509.02333, "Smooth advantage standardization".
    """
    mean_all, std_all = merged(groups.mean(reward, group), groups.std(reward, group), mean, std, count)
    return jax.lax.stop_gradient({"mean": mean_all, "std": std_all, "count": count + 1})


def _standardised(deviation: PerSequence, std: PerSequence) -> PerSequence:
    return jnp.where(std == 0, 0.0, deviation / jnp.where(std == 0, 1.0, std))
