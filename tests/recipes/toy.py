"""Batches of plain arrays for any recipe, and a policy small enough to differentiate by eye."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.learner import assemble
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience, Prompts, Samples, Verdict

PROMPTS, TIME, VOCABULARY = 6, 6, 5
GIVEN = {"reference": ("reference_logp",), "old": ("old_logp",), "teacher": ("teacher_logp",), "critic": ("values",),
         "moments": ("second_moment", "third_moment", "hidden_square")}


def prompts(count: int) -> Prompts:
    """Prompts that say nothing but their number."""
    row = jnp.arange(count)
    return Prompts(tokens=row[:, None], lengths=jnp.ones(count, int), example=row, domain=jnp.zeros(count, int),
                   facts={"answer": row})


def coefficients(recipe: Recipe) -> dict:
    """First values of the recipe's adapting coefficients."""
    return {name: control.read(control.init(64)) for name, control in recipe.schedule.controls.items()}


def experience(recipe: Recipe, seed: int = 0, count: int = PROMPTS) -> Experience:
    """Samples with holes, one empty, one full and one failed sequence; odd samples are right, and all of prompt 1.

    What the recipe asked for is there and nothing else, so reading more is an error.
    """
    rng = np.random.default_rng(seed)
    shape = (count * recipe.group_size, TIME)
    length = rng.integers(1, TIME + 1, shape[0])
    mask = (np.arange(TIME) < length[:, None]) & (rng.random(shape) < 0.8)
    mask[:, 0] = True
    mask[0], mask[1] = False, True
    failed = np.arange(shape[0]) == shape[0] - 1
    prompt, sample = np.divmod(np.arange(shape[0]), recipe.group_size)
    score = ((prompt == 1) | (sample % 2 == 1)) + 0.1 * rng.random(shape[0])

    def logp():
        return jnp.asarray(-np.abs(rng.normal(size=shape)), jnp.float32)

    samples = Samples(tokens=jnp.asarray(rng.integers(0, VOCABULARY, shape)), mask=jnp.asarray(mask),
                      rollout_logp=logp(), rollout_entropy=-logp(), finished=jnp.asarray(length < TIME),
                      version=jnp.zeros(shape[0], int))
    verdict = Verdict(score=jnp.asarray(score, jnp.float32), parts={}, failed=jnp.asarray(failed))
    x = assemble.experience(prompts(count), samples, verdict, coefficients=coefficients(recipe))
    given = {name: logp() for model in recipe.models for name in GIVEN[model]}
    for name in GIVEN["moments"]:  # sums of powers of probabilities, and a squared norm
        given |= {name: jnp.exp(given[name])} if name in given else {}
    seed = jnp.asarray(rng.integers(0, 2**32, shape[0], dtype=np.uint32))
    # the second half of an answer is its second turn; prompts belong to two domains
    turn = jnp.broadcast_to(jnp.arange(TIME) // (TIME // 2), shape)
    return dataclasses.replace(x, given=given, seed=seed, turn=turn, domain=jnp.asarray(prompt % 2),
                               views={name: logp() for name in recipe.views} or None)


def policy(x: Experience, seed: int = 1) -> Evaluated:
    """A policy that has moved a little from the one that drew the samples: inside and outside of any band."""
    rng = np.random.default_rng(seed)
    moved = x.rollout_logp + 0.3 * jnp.asarray(rng.normal(size=x.mask.shape), jnp.float32)
    positive = jnp.asarray(np.abs(rng.normal(size=(2, *x.mask.shape))), jnp.float32)
    return Evaluated(logp=moved, entropy=positive[0], values=positive[1])


def parameters() -> dict:
    """Of a policy whose next token depends on the position alone, with a value for each position."""
    rng = np.random.default_rng(2)
    return {"logits": jnp.asarray(rng.normal(size=(TIME, VOCABULARY)), jnp.float32),
            "values": jnp.asarray(rng.normal(size=TIME), jnp.float32)}


def evaluate(parameters: dict, x: Experience) -> Evaluated:
    """What that policy says of the drawn tokens."""
    logp = jax.nn.log_softmax(parameters["logits"])
    entropy = -(jnp.exp(logp) * logp).sum(axis=-1)
    chosen = logp[jnp.arange(logp.shape[0])[None], x.tokens]
    return Evaluated(logp=chosen, entropy=jnp.broadcast_to(entropy, x.mask.shape),
                     values=jnp.broadcast_to(parameters["values"], x.mask.shape))
