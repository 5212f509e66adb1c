"""One question, one answer token: a bandit with a fixed value per arm."""
import string
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols

ARMS = string.digits + string.ascii_letters


def bandit(values: Sequence[float] = (0.0, 1.0)) -> task.Task:
    """The answer is one arm, and its value the score; anything that is no arm scores 0.

    There is one question, so every split holds it. No end token is needed: T is 1.

    Args:
      values: the score of each arm, in [0, 1]; 1 means correct.
    """
    values = tuple(float(v) for v in values)
    if not 1 <= len(values) <= len(ARMS) or not all(0 <= v <= 1 for v in values):
        raise ValueError(f"values={values}: 1 to {len(ARMS)} numbers in [0, 1] are allowed.")
    tokenizer = symbols.Symbols(ARMS[: len(values)] + "?")
    question = task.Example(
        prompt=tokenizer.encode("?"), text="?", facts={"values": np.asarray(values, np.float32)},
        answer=tokenizer.encode(ARMS[int(np.argmax(values))]))
    return task.Task(
        name="bandit", splits={split: (question,) for split in ("train", "validation", "held_out")},
        tokenizer=tokenizer, verifier=task.PureVerifier(score), prompt_length=1, completion_length=1,
        fingerprint=task.fingerprint("bandit", values=values))


def score(
    facts: dict[str, Array], tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """The value of the arm that the first token names."""
    values = facts["values"]
    arm = tokens[:, 0] - symbols.FIRST
    named = mask[:, 0] & (arm >= 0) & (arm < values.shape[1])
    value = jnp.take_along_axis(values, jnp.clip(arm, 0, values.shape[1] - 1)[:, None], axis=1)[:, 0]
    return jnp.where(named, value, 0.0), {}
