"""Credit by comparison within a group: the samples of one prompt.

`group` numbers the group of each sequence, in any order, with ids in [0, 2N). A sequence that is
alone in its group has nothing to be compared with and keeps its raw reward. Rewards are constants:
no gradient passes.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax.types import Group, PerSequence, Scalar


def size(group: Group) -> Float[Array, " N"]:
    """G: how many sequences there are in each sequence's group.

    Args:
      group: id of each sequence's group, in [0, 2N).
    """
    return _total(jnp.ones(group.shape), group)


def mean(reward: PerSequence, group: Group) -> PerSequence:
    """mu = sum of the group's rewards / G, for each sequence that of its group.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
    """
    return jax.lax.stop_gradient(reward) - _deviation(reward, group)


def std(reward: PerSequence, group: Group, *, ddof: int = 1) -> PerSequence:
    """sigma = sqrt(sum of the group's (R - mu)^2 / (G - ddof)); exactly 0 if all are equal or G <= ddof.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      ddof: what is taken off the count: 1 gives the sample's estimate, 0 the population's.
    """
    squares = _total(_deviation(reward, group) ** 2, group)
    return jnp.sqrt(squares / jnp.maximum(size(group) - ddof, 1))


def centred(reward: PerSequence, group: Group) -> PerSequence:
    """R - mu, in reward units; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    return jnp.where(size(group) == 1, jax.lax.stop_gradient(reward), _deviation(reward, group))


def zscore(reward: PerSequence, group: Group, *, epsilon: float = 1e-6, ddof: int = 1) -> PerSequence:
    """(R - mu) / (sigma + epsilon), dimensionless; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      epsilon: added to the standard deviation, in reward units.
      ddof: 1 for the sample's standard deviation, 0 for the population's; papers differ.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    scale = jnp.where(size(group) == 1, 1.0, std(reward, group, ddof=ddof) + epsilon)
    return centred(reward, group) / scale


def leave_one_out(reward: PerSequence, group: Group) -> PerSequence:
    """R - mean of the group's other rewards = G / (G - 1) (R - mu); R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).

    Source: Ahmadian et al. 2024, arXiv:2402.14740, "REINFORCE Leave-One-Out".
    """
    count = size(group)
    return jnp.where(count == 1, 1.0, count / jnp.maximum(count - 1, 1)) * centred(reward, group)


def leave_one_out_zscore(reward: PerSequence, group: Group, *, floor: Scalar = 1e-7) -> PerSequence:
    """`leave_one_out` / max(sigma, floor), dimensionless; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      floor: the smallest divisor, in reward units, > 0; sigma is the population's standard deviation (ddof 0).

    Source: Chen et al. 2025, arXiv:2502.01600, an option of its published code.
    """
    scale = jnp.where(size(group) == 1, 1.0, jnp.maximum(std(reward, group, ddof=0), floor))
    return leave_one_out(reward, group) / scale


def shifted(reward: PerSequence, group: Group, shift: Scalar) -> PerSequence:
    """R - (mu - shift), in reward units: a lower baseline, so that good answers count more than bad ones; R if alone.

    For `loss.score.policy_gradient` it is `centred` plus `loss.reject.forward_divergence` of coefficient shift.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      shift: how far below the mean the baseline is, in reward units.

    Source: Arnal et al. 2025, arXiv:2506.20520, "AsymRE"; Trinity-RFT, asymre_advantage.py, baseline_shift.
    """
    return centred(reward, group) + jnp.where(size(group) == 1, 0.0, shift)


def log_mean_exp(reward: PerSequence, group: Group, temperature: Scalar) -> PerSequence:
    """tau log(mean of the group's exp(R / tau)), in reward units: the mean for large tau, the best for small.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      temperature: tau, in reward units, > 0.

    Source: Pan et al. 2025, arXiv:2505.17826, "OPMD"; Trinity-RFT, opmd_advantage.py, "logavgexp".
    """
    return jax.lax.stop_gradient(reward) - _above_log_mean_exp(reward, group, temperature)


def above_log_mean_exp(reward: PerSequence, group: Group, temperature: Scalar) -> PerSequence:
    """R - `log_mean_exp`, in reward units; exactly 0 if all are equal, R in a group of one.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      temperature: tau, in reward units, > 0.

    Source: Pan et al. 2025, arXiv:2505.17826, "OPMD"; Trinity-RFT, opmd_advantage.py, "logavgexp".
    """
    credit = _above_log_mean_exp(reward, group, temperature)
    return jnp.where(size(group) == 1, jax.lax.stop_gradient(reward), credit)


def zscore_with_virtual(reward: PerSequence, group: Group, virtual: Scalar, *, count: int = 1, epsilon: float = 1e-6,
                        ddof: int = 1) -> PerSequence:
    """(R - mu) / (sigma + epsilon), with `count` answers of reward `virtual` added to each group's statistics.

    Answers of a group that all failed get negative credit instead of none: -1 / sqrt(G + 1) with one virtual answer
    that is right. Credit no longer sums to 0. R in a group of one; count = 0 is `zscore`.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      virtual: reward of the answers that nobody gave, in reward units: the largest there is.
      count: how many of them, >= 0.
      epsilon: added to the standard deviation, in reward units.
      ddof: 1 for the sample's standard deviation of the G + count rewards, 0 for the population's.

    Source: Nan et al. 2025, arXiv:2509.18851, "Advantage Calibration", with its published code.
    """
    reward, members = jax.lax.stop_gradient(reward), size(group) + count
    smallest = _smallest(reward, group)
    above, virtual_above = reward - smallest, virtual - smallest
    mean_above = (_total(above, group) + count * virtual_above) / members
    squares = _total((above - mean_above) ** 2, group) + count * (virtual_above - mean_above) ** 2
    credit = (above - mean_above) / (jnp.sqrt(squares / jnp.maximum(members - ddof, 1)) + epsilon)
    return jnp.where(size(group) == 1, reward, credit)


def centred_among(reward: PerSequence, group: Group, kept: Bool[Array, " N"]) -> PerSequence:
    """R - mean of the group's kept rewards, in reward units; 0 where not kept, R where at most one was kept.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      kept: which sequences count.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Drop"; Trinity-RFT, rec_advantage.py.
    """
    reward = jax.lax.stop_gradient(reward)
    credit = jnp.where(_total(kept * 1.0, group) <= 1, reward, _deviation_among(reward, group, kept))
    return jnp.where(kept, credit, 0.0)


def zscore_among(reward: PerSequence, group: Group, kept: Bool[Array, " N"], *, epsilon: float = 1e-6,
                 ddof: int = 0) -> PerSequence:
    """`centred_among` / (sigma of the kept + epsilon), dimensionless; 0 where not kept, R where at most one was kept.

    Args:
      reward: R, in reward units.
      group: id of each sequence's group, in [0, 2N).
      kept: which sequences count.
      epsilon: added to the standard deviation, in reward units.
      ddof: 0 for the population's standard deviation, 1 for the sample's.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Drop"; Trinity-RFT, rec_advantage.py, std_normalize.
    """
    count = _total(kept * 1.0, group)
    squares = _total(_deviation_among(jax.lax.stop_gradient(reward), group, kept) ** 2, group)
    scale = jnp.sqrt(squares / jnp.maximum(count - ddof, 1)) + epsilon
    return centred_among(reward, group, kept) / jnp.where(count <= 1, 1.0, scale)


def _deviation(reward: PerSequence, group: Group) -> PerSequence:
    # Measured from the group's smallest reward: equal rewards give exactly 0, whatever the rounding of their mean.
    reward = jax.lax.stop_gradient(reward)
    above = reward - _smallest(reward, group)
    return above - _total(above, group) / size(group)


def _deviation_among(reward: PerSequence, group: Group, kept: Bool[Array, " N"]) -> PerSequence:
    smallest = _smallest(jnp.where(kept, reward, jnp.inf), group)
    above = jnp.where(kept, reward - jnp.where(kept, smallest, 0.0), 0.0)
    return jnp.where(kept, above - _total(above, group) / jnp.maximum(_total(kept * 1.0, group), 1), 0.0)


def _above_log_mean_exp(reward: PerSequence, group: Group, temperature: Scalar) -> PerSequence:
    reward = jax.lax.stop_gradient(reward)
    below = reward + _smallest(-reward, group)  # from the largest, so that exp stays within [0, 1]
    return below - temperature * jnp.log(_total(jnp.exp(below / temperature), group) / size(group))


def _smallest(x: PerSequence, group: Group) -> PerSequence:
    return jax.ops.segment_min(x, group, num_segments=2 * group.shape[0])[group]


def _total(x: PerSequence, group: Group) -> PerSequence:
    return jax.ops.segment_sum(x, group, num_segments=2 * group.shape[0])[group]
