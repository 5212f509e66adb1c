"""The weights of each role, whole: what is trained, joined with what is kept and shared."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rl_jax.models import heads, lora, trainable
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.types import Parameters, TrainState

Roles = dict[str, Parameters]


def begin(recipe: Recipe, network: Network, policy: Parameters, teacher: Parameters | None,
          train: str) -> tuple[Roles, Roles]:
    """(what is trained, what is frozen), by role, at the start of a phase; all are copies.

    Where only a part is trained, `frozen["policy"]` holds the rest, which policy, critic and reference share: a
    reference costs a copy of the trained part, and beside adapters none at all, as it is the same weights without them.

    Args:
      policy: whole weights; of the same network, with fresh adapters where it has some.
      train: see `models.trainable.split`.
    """
    def copied(tree: Parameters) -> Parameters:
        return jax.tree.map(jnp.copy, tree)

    trained, kept = trainable.split(policy, train)
    parameters = {"policy": copied(trained)}
    frozen = {"policy": copied(kept)} if kept else {}
    if "critic" in recipe.models:
        parameters["critic"] = heads.critic_from(network, trained)
    if "reference" in recipe.models and train != trainable.LORA:
        frozen["reference"] = copied(trained)
    if "teacher" in recipe.models:
        frozen["teacher"] = copied(teacher)
    return parameters, frozen


def whole(parameters: Roles, frozen: Roles) -> Roles:
    """The policy's weights and, where there is one, the critic's, with what they share."""
    kept = frozen.get("policy", {})
    found = {**parameters, "policy": trainable.joined(parameters["policy"], kept)}
    if "critic" in parameters:
        critic = parameters["critic"]
        found["critic"] = {**critic, "body": trainable.joined(critic["body"], kept)}
    return found


def policy(state: TrainState) -> Parameters:
    """The policy's whole weights, its adapters beside the projections."""
    return trainable.joined(state.parameters["policy"], state.frozen.get("policy", {}))


def plain_policy(state: TrainState, network: Network) -> Parameters:
    """The policy's whole weights, its adapters merged into the projections."""
    found = policy(state)
    return lora.merged(found, network.adapters) if lora.there(found) else found


def frozen_weights(role: str, frozen: Roles) -> Parameters:
    """The whole weights of the reference or of the teacher."""
    if role == "teacher":
        return frozen["teacher"]
    return trainable.joined(frozen.get("reference", {}), frozen.get("policy", {}))


def bound(function: Callable[..., Any], frozen: Roles) -> Callable[..., Any]:
    """function(whole weights by role, ...) as a function of what is trained alone."""
    return lambda parameters, *rest: function(whole(parameters, frozen), *rest)
