"""A tree of tokens small enough to enumerate: expectations, gradients and pass@k are exact."""
import functools
import itertools
import string

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols

LARGEST = 81


def token_tree(depth: int = 3, branching: int = 3, *, seed: int = 0) -> task.Task:
    """The answer is a path of `depth` branches; each of the branching^depth paths has a fixed reward.

    A completion that leaves the tree (ends early, repeats the question) scores 0, so sums over
    `strings` are exact for a policy over the whole vocabulary. There is one question, so every
    split holds it.

    Args:
      depth: tokens in an answer; T, as no end token is needed.
      branching: tokens to choose from at each step, at most 9.
      seed: fixes the table of rewards.
    """
    table = rewards(depth, branching, seed)
    tokenizer = symbols.Symbols(string.digits[:branching] + "?")
    question = task.Example(prompt=tokenizer.encode("?"), text="?", facts={"rewards": table},
                            answer=strings(depth, branching)[np.argmax(table)].tolist())
    return task.Task(
        name="token_tree", splits={split: (question,) for split in ("train", "validation", "held_out")},
        tokenizer=tokenizer, verifier=task.PureVerifier(functools.partial(score, branching)), prompt_length=1,
        completion_length=depth, fingerprint=task.fingerprint("token_tree", rewards=table.tolist()))


def strings(depth: int, branching: int) -> Int[np.ndarray, "B T"]:
    """All B = branching^depth answers as token ids, the last token changing fastest."""
    if depth < 1 or not 1 <= branching <= 9 or branching**depth > LARGEST:
        raise ValueError(f"depth={depth}, branching={branching}: allowed are depth >= 1, 1 <= branching <= 9 and "
                         f"at most {LARGEST} answers (branching^depth).")
    paths = itertools.product(range(branching), repeat=depth)
    return symbols.FIRST + np.array(list(paths), np.int32)


def rewards(depth: int, branching: int, seed: int) -> Float[np.ndarray, " B"]:
    """A reward for each of `strings`, from 0, 1/4, 1/2, 3/4 and 1; at least one is 1."""
    random = np.random.default_rng(seed)
    table = random.integers(0, 5, len(strings(depth, branching))) / np.float32(4)
    table[random.integers(len(table))] = 1.0
    return table.astype(np.float32)


def score(
    branching: int, facts: dict[str, Array], tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """The reward of the path that the tokens are."""
    branch = tokens - symbols.FIRST
    inside = jnp.all(mask & (branch >= 0) & (branch < branching), axis=1)
    place = branching ** np.arange(tokens.shape[1] - 1, -1, -1)
    path = jnp.where(inside, branch @ place, 0)
    reward = jnp.take_along_axis(facts["rewards"], path[:, None], axis=1)[:, 0]
    return jnp.where(inside, reward, 0.0), {}


def expected_reward(logp: Float[Array, " B"], reward: Float[Array | np.ndarray, " B"]) -> Float[Array, ""]:
    """sum_s p(s) r(s); its gradient with respect to what made logp is the exact policy gradient.

    Args:
      logp: log-probability of each of `strings`, in nats.
      reward: r of each, in reward units.
    """
    return jnp.sum(jnp.exp(logp) * reward)


def pass_at_k(logp: Float[Array, " B"], reward: Float[Array | np.ndarray, " B"], k: int) -> Float[Array, ""]:
    """1 - (1 - p)^k, with p the probability of the answers of reward 1: one of k samples is correct.

    Args:
      logp: log-probability of each of `strings`, in nats.
      reward: r of each, in reward units.
      k: independent samples.
    """
    correct = jnp.sum(jnp.where(reward == 1.0, jnp.exp(logp), 0.0))
    return 1.0 - (1.0 - correct) ** k
