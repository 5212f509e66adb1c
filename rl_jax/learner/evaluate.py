"""What weights say of drawn tokens: log-probability, entropy and value, without logits."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from kernels_pallas.linear_logprob import statistics
from kernels_pallas.linear_policy_loss.reference import Head
from rl_jax.batching import Batching
from rl_jax.learner import gate, roles, update
from rl_jax.models import heads, mesh
from rl_jax.models.network import Network
from rl_jax.models.routes import Routes
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience, Parameters, Prompts


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
        hidden = _hidden(network, parameters["policy"], x)
        logp, entropy = _of_hidden(network, parameters["policy"], hidden, x, temperature, implementation)
        return Evaluated(logp=logp, entropy=entropy, values=_values(network, parameters, x))

    return evaluate


def make_objective(recipe: Recipe, network: Network, temperature: float) -> update.Objective:
    """`update.make_objective` of `make_evaluate`, in one sweep over the logits where that is faster.

    Args:
      temperature: of the rollout; greater than 0.
    """
    in_two_steps = update.make_objective(recipe, make_evaluate(network, temperature))

    def objective(parameters: dict[str, Parameters], x: Experience, weight: Any, share: Float[Array, "N T"]):
        if mesh.current() is not None:  # there every device makes the log-probabilities of its own rows and tokens
            return in_two_steps(parameters, x, weight, share)
        hidden = _hidden(network, parameters["policy"], x)
        head = Head(hidden.reshape(x.tokens.size, -1), network.vocabulary(parameters["policy"]), x.tokens.reshape(-1),
                    temperature, network.logit_cap, _support(x))
        return gate.with_metrics(gate.of_head(recipe, head, _values(network, parameters, x), x, weight, share))

    return objective


def _values(network: Network, parameters: dict[str, Parameters], x: Experience) -> Float[Array, "N T"] | None:
    if "critic" not in parameters:
        return None
    body, weight = parameters["critic"]["body"], parameters["critic"]["value"]
    return heads.value(_hidden(network, body, unrouted(x)), weight)


def _hidden(network: Network, parameters: Parameters, x: Experience) -> Float[Array, "N T D"]:
    routes = None if x.routes is None else Routes(x.prompts.routes, x.routes)
    return network.hidden(parameters, x.prompts.tokens, x.prompts.lengths, x.tokens, routes, x.segment)


def unrouted(x: Experience) -> Experience:
    """x without routes: the routers of whoever evaluates it choose."""
    return dataclasses.replace(x, routes=None, prompts=dataclasses.replace(x.prompts, routes=None))


def with_routes(recipe: Recipe, network: Network, parameters: Parameters, x: Experience,
                microbatches: int = 1) -> Experience:
    """x with the routes that the recipe's updates replay: none, those of the rollout, or the policy's own of now.

    Args:
      parameters: the policy's whole weights.

    Raises:
      ValueError: if the rollout's are wanted of a network that mixes experts, and were not recorded.
    """
    if recipe.routing == "free" or network.shape.mixtures == 0:
        return unrouted(x)
    if recipe.routing == "rollout":
        if x.routes is None:
            raise ValueError(f"recipe {recipe.name!r} replays the experts of the rollout, and answers that are given or "
                             'grow in windows have none recorded: take routing="old" or "free".')
        return x

    def routes(parameters, x):
        found = network.routes(parameters, x.prompts.tokens, x.prompts.lengths, x.tokens)
        return Routes(found.prompt, found.completion)

    found = update.in_parts(routes, parameters, unrouted(x), microbatches)
    return dataclasses.replace(x, routes=found.completion, prompts=dataclasses.replace(x.prompts, routes=found.prompt))


def _of_hidden(network: Network, parameters: Parameters, hidden: Float[Array, "N T D"], x: Experience,
               temperature: float, implementation: str | None) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    n, t, d = hidden.shape
    logp, entropy = network.logprob(hidden.reshape(n * t, d), network.vocabulary(parameters), x.tokens.reshape(-1),
                                    temperature=temperature, support=_support(x), implementation=implementation)
    return logp.reshape(n, t), entropy.reshape(n, t)


def _support(x: Experience) -> UInt32[Array, "M W"] | None:
    return None if x.support is None else x.support.reshape(x.tokens.size, -1)


def with_models(recipe: Recipe, network: Network, evaluate: update.Evaluate, parameters: dict[str, Parameters],
                frozen: dict[str, Parameters], x: Experience, microbatches: int = 1, *,
                batching: Batching = Batching()) -> Experience:
    """x with what the recipe's `models`, `views` and `routing` asked for, and nothing that it did not ask for.

    Args:
      evaluate: of whole weights.
      parameters: whole weights by role (`roles.whole`).
      frozen: the state's.
      batching: in which shapes the networks are run; the experts of `routing` "old" are found in whole rows.
    """
    x = with_routes(recipe, network, parameters["policy"], x, microbatches)

    def all_parts(weights, x=x):
        return update.in_parts(evaluate, weights, x, microbatches, batching)

    given = dict(x.given)
    for role in ("reference", "teacher"):
        if role in recipe.models:
            given[f"{role}_logp"] = all_parts({"policy": roles.frozen_weights(role, frozen)}, unrouted(x)).logp
    if "old" in recipe.models or "critic" in recipe.models:
        now = all_parts(parameters if "critic" in recipe.models else {"policy": parameters["policy"]})
        if "old" in recipe.models:
            given["old_logp"] = now.logp
        if "critic" in recipe.models:
            given["values"] = now.values
    if "moments" in recipe.models:
        temperature = 1.0 if recipe.rollout is None else recipe.rollout.temperature
        found = update.in_parts(make_moments(network, temperature), parameters, x, microbatches, batching)
        given |= dict(zip(("second_moment", "third_moment", "hidden_square"), found, strict=True))
    x = dataclasses.replace(x, given=jax.lax.stop_gradient(given))
    if not recipe.views:
        return x
    views = {name: all_parts({"policy": parameters["policy"]}, unrouted(dataclasses.replace(x, prompts=seen(x)))).logp
             for name, seen in views_of(recipe).items()}
    return dataclasses.replace(x, views=jax.lax.stop_gradient(views))


def views_of(recipe: Recipe) -> dict[str, Callable[[Experience], Prompts]]:
    """By name, x -> the prompts under which the answers are scored again; lots are drawn per prompt."""
    def bound(view):
        return lambda x: view(x.prompts, x.seed[::x.mask.shape[0] // x.prompts.lengths.shape[0]])

    return {name: bound(view) for name, view in recipe.views.items()}


def make_moments(network: Network, temperature: float) -> Callable[[dict[str, Parameters], Experience], Any]:
    """Returns moments(parameters, x) -> (sum_v p_v^2, sum_v p_v^3, squared norm of the hidden state), each [N, T].

    p is the distribution that `make_evaluate` speaks of. No logits are kept, and they are made once.
    """
    def moments(parameters: dict[str, Parameters], x: Experience):
        hidden = _hidden(network, parameters["policy"], x)
        n, t, d = hidden.shape
        head = statistics.Head(hidden.reshape(n * t, d), network.vocabulary(parameters["policy"]), temperature,
                               network.logit_cap)
        wanted = "second_moment", "third_moment"
        found = statistics.linear_statistics(head, x.tokens.reshape(-1), wanted, support=_support(x))
        square = (hidden.astype(jnp.float32) ** 2).sum(axis=2)
        return *(found[name].reshape(n, t) for name in wanted), square

    return moments
