"""Conflict tokens: the same token at the same place in a good and in a bad answer to one prompt.

What begins a good and a bad answer alike is pushed up by the one and down by the other, though it did
nothing wrong. A token is in conflict if some answer of its group with A > 0 and some with A < 0 has that
token at that position. Only runs count: from an answer's first token, or back from its last one with
positions counted from the end, up to the first token that is not in conflict. Positions count the tokens
that the policy chose; what it did not choose never matches and does not end a run. Answers with A = 0
make no conflicts.

The N T tokens are sorted by group, position and token, once per direction: O(N T) memory, no table of
pairs of answers.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rl_jax.types import Group, Mask, PerSequence, Scalar, Tokens


def forward_run(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask) -> Bool[Array, "N T"]:
    """Whether all chosen tokens from the answer's first to this one are in conflict, positions counted from the start.

    Args:
      tokens: ids of the chosen tokens.
      advantage: A, of which the sign is read.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.

    Source: Simoni et al. 2025, arXiv:2508.03772.
    """
    conflict = _in_conflict(tokens, jnp.cumsum(mask, axis=1), advantage, group, mask)
    return mask & (jnp.cumprod(conflict | ~mask, axis=1) > 0)


def backward_run(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask) -> Bool[Array, "N T"]:
    """Whether all chosen tokens from this one to the answer's last are in conflict, positions counted from the end.

    Args:
      tokens: ids of the chosen tokens.
      advantage: A, of which the sign is read.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.

    Source: Simoni et al. 2025, arXiv:2508.03772.
    """
    return forward_run(tokens[:, ::-1], advantage, group, mask[:, ::-1])[:, ::-1]


def factor(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask, boost: Scalar = 2.0) -> Tokens:
    """lambda: in either run `boost` where A > 0 and 0 where A < 0; 1 on every other token.

    Args:
      tokens: ids of the chosen tokens.
      advantage: A, of which the sign is read, before any other term is added to it.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.
      boost: how much a token in a run counts in a good answer, dimensionless.

    Source: Simoni et al. 2025, arXiv:2508.03772.
    """
    return _factor(_either_run(tokens, advantage, group, mask), advantage, boost)


def factor_per_run(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask,
                   boost: Scalar = 2.0) -> Tokens:
    """lambda of the forward run times that of the backward run: `factor`, but boost^2 in both runs of a good answer.

    Args:
      tokens: ids of the chosen tokens.
      advantage: A, of which the sign is read, before any other term is added to it.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.
      boost: how much a token in one run counts in a good answer, dimensionless.

    Source: the published code of Simoni et al. 2025, github.com/winstonsmith1897/GTPO; not in the paper.
    """
    where = (tokens, advantage, group, mask)
    return _factor(forward_run(*where), advantage, boost) * _factor(backward_run(*where), advantage, boost)


def inverse_count(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask) -> PerSequence:
    """1 / max(number of the answer's tokens in either run, 1), by which the published code multiplies its loss.

    Answers with A = 0 get 1.

    Args:
      tokens: ids of the chosen tokens.
      advantage: A, of which the sign is read.
      group: id of each sequence's group, in [0, 2N).
      mask: which tokens the policy chose.

    Source: the published code of Simoni et al. 2025, github.com/winstonsmith1897/GTPO; not in the paper.
    """
    run = _either_run(tokens, advantage, group, mask) & (advantage != 0)[:, None]
    return 1.0 / jnp.maximum(run.sum(axis=1), 1)


def _either_run(tokens: Int[Array, "N T"], advantage: PerSequence, group: Group, mask: Mask) -> Bool[Array, "N T"]:
    return forward_run(tokens, advantage, group, mask) | backward_run(tokens, advantage, group, mask)


def _factor(run: Bool[Array, "N T"], advantage: PerSequence, boost: Scalar) -> Tokens:
    in_run = jnp.where(advantage > 0, boost, jnp.where(advantage < 0, 0.0, 1.0))[:, None]
    return jax.lax.stop_gradient(jnp.where(run, in_run, 1.0))


def _in_conflict(tokens: Int[Array, "N T"], position: Int[Array, "N T"], advantage: PerSequence, group: Group,
                 mask: Mask) -> Bool[Array, "N T"]:
    keys = [key.reshape(-1) for key in (jnp.broadcast_to(group[:, None], mask.shape), position, tokens)]
    *keys, place = jax.lax.sort([*keys, jnp.arange(mask.size)], num_keys=3)
    new = sum(key[1:] != key[:-1] for key in keys) > 0
    kind = jnp.zeros(mask.size, jnp.int32).at[place[1:]].set(jnp.cumsum(new, dtype=jnp.int32))

    def somewhere(sign):
        here = (mask & sign[:, None]).reshape(-1).astype(jnp.int32)
        return jax.ops.segment_max(here, kind, num_segments=mask.size)[kind] > 0

    return mask & (somewhere(advantage > 0) & somewhere(advantage < 0)).reshape(mask.shape)
