"""What weights say of drawn tokens: log-probability, entropy and value, without logits."""
import dataclasses

import jax
from jaxtyping import Array, Float

from kernels_pallas.linear_logprob.op import linear_logprob
from rl_jax.learner import update
from rl_jax.models import network as networks
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience, Parameters


def make_evaluate(network: Network, temperature: float, *, implementation: str | None = None) -> update.Evaluate:
    """Returns evaluate(parameters, x) -> Evaluated, differentiable in the parameters.

    `parameters` holds the weights by role: "policy" and, where the recipe asks for one, "critic".
    Log-probability and entropy are of the distribution that sampled: at its temperature and, where
    sampling was truncated, among the tokens that were kept when the token was drawn.

    Args:
      temperature: of the rollout; greater than 0.
      implementation: of `linear_logprob`; None is the best for the device.
    """
    def evaluate(parameters: dict[str, Parameters], x: Experience) -> Evaluated:
        hidden = network.hidden(parameters["policy"], x.prompts.tokens, x.prompts.lengths, x.tokens)
        logp, entropy = _of_hidden(network, parameters["policy"], hidden, x, temperature, implementation)
        values = None
        if "critic" in parameters:
            body, weight = parameters["critic"]["body"], parameters["critic"]["value"]
            state = network.hidden(body, x.prompts.tokens, x.prompts.lengths, x.tokens)
            values = networks.value_head(state, weight)
        return Evaluated(logp=logp, entropy=entropy, values=values)

    return evaluate


def _of_hidden(network: Network, parameters: Parameters, hidden: Float[Array, "N T D"], x: Experience,
               temperature: float, implementation: str | None) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    n, t, d = hidden.shape
    support = None if x.support is None else x.support.reshape(n * t, -1)
    logp, entropy = linear_logprob(hidden.reshape(n * t, d), network.vocabulary(parameters), x.tokens.reshape(-1),
                                   temperature=temperature, support=support, implementation=implementation)
    return logp.reshape(n, t), entropy.reshape(n, t)


def with_models(recipe: Recipe, evaluate: update.Evaluate, parameters: dict[str, Parameters],
                frozen: dict[str, Parameters], x: Experience, microbatches: int = 1) -> Experience:
    """x with what the recipe's `models` asked for, and nothing that it did not ask for."""
    def all_parts(weights):
        if microbatches == 1:
            return evaluate(weights, x)
        whole = dataclasses.replace(x, coefficients=None)
        parts = jax.lax.map(lambda part: evaluate(weights, part), update.cut(whole, microbatches))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)

    given = dict(x.given)
    for role in ("reference", "teacher"):
        if role in recipe.models:
            given[f"{role}_logp"] = all_parts({"policy": frozen[role]}).logp
    if "old" in recipe.models or "critic" in recipe.models:
        now = all_parts(parameters if "critic" in recipe.models else {"policy": parameters["policy"]})
        if "old" in recipe.models:
            given["old_logp"] = now.logp
        if "critic" in recipe.models:
            given["values"] = now.values
    return dataclasses.replace(x, given=jax.lax.stop_gradient(given))
