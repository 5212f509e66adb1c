"""From hidden states to a policy's loss and its gradients, without the logits."""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas import dispatch
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_policy_loss import blocks, forward, reference
from kernels_pallas.linear_policy_loss.reference import Batch, Head
from kernels_pallas.policy_gate import backward as gate_backward
from kernels_pallas.policy_gate import trace
from kernels_pallas.policy_gate.grid import Block
from kernels_pallas.policy_gate.op import DIAGNOSED, check_results, policy_gate
from kernels_pallas.policy_gate.reference import ONLY, Gate, Gated


def linear_policy_loss(gate: Gate, head: Head, batch: Batch, *,
                       implementation: str | None = None) -> Gated:
    """`policy_gate` of the log-probability and the entropy that `linear_logprob` gives, and of what the batch holds.

    Differentiable in the head's hidden states and vocabulary and in the batch's policy arrays. Where the gate looks at
    one token at a time, one sweep can make the loss and all gradients: a row of logits is made once instead of once
    per direction.

    Args:
      gate: as of `policy_gate`; finds "logp" and "entropy" in policy.
      head: the last layer, one row per token.
      batch: [N, T] arrays.
      implementation: "reference" (all logits in memory), "xla" (one sweep, a block of rows with all their logits at a
        time), "two_step" (`linear_logprob`, then `policy_gate`, each the best on this device), "pallas" (the same with
        both as kernels), or None for the best on this device.

    Raises:
      ValueError: as `linear_logprob` and `policy_gate`; "xla" with a gate that looks beyond one token.
    """
    if batch.mask.size != head.hidden.shape[0]:
        raise ValueError(f"the head has {head.hidden.shape[0]} rows and the mask is {batch.mask.shape}: there must be "
                         "a row of the head for every token, N * T.")
    one = jax.ShapeDtypeStruct(batch.mask.shape, jnp.float32)
    policy = {**batch.policy, "logp": one, "entropy": one}
    traced = trace.function(gate, "gate", policy, {**batch.given, "mask": batch.mask})
    best = blocks.best(*head.vocabulary.shape, traced.level)
    run = dispatch.implementation("linear_policy_loss", implementation, best, {
        "reference": lambda: reference.linear_policy_loss(gate, head, batch),
        "xla": lambda: _one_sweep(gate, traced, policy, head, batch),
        "two_step": lambda: _two_step(None, gate, head, batch),
        "pallas": lambda: _two_step("pallas", gate, head, batch)})
    return run()


def _two_step(implementation: str | None, gate: Gate, head: Head, batch: Batch) -> Gated:
    logp, entropy = linear_logprob(head.hidden, head.vocabulary, head.targets, temperature=head.temperature,
                                   soft_cap=head.soft_cap, support=head.support, implementation=implementation)
    policy = {**batch.policy, **reference.found(logp, entropy, batch.mask)}
    return policy_gate(gate, policy, *batch[1:], level=None, implementation=implementation)


def _one_sweep(gate: Gate, traced: trace.Traced, policy: dict, head: Head, batch: Batch) -> Gated:
    if traced.level != "token":
        raise ValueError("implementation='xla' makes the loss token by token, and this gate was not seen to be of one "
                         f"token at a time ({traced.obstacle or traced.reduction}): take 'two_step' or None.")
    check_results(traced.out, batch.mask, batch.weight)
    weight = batch.weight if isinstance(batch.weight, dict) else {ONLY: batch.weight}
    read_given = {*DIAGNOSED["given"], *traced.given}
    block = Block({name: x for name, x in batch.policy.items() if name in traced.policy - traced.moving},
                  {name: x for name, x in batch.given.items() if name in read_given}, batch.mask, weight, batch.share)
    per_token = functools.partial(jax.tree.map, functools.partial(_per_token, batch.mask.shape))
    moving = {"hidden": head.hidden, "vocabulary": head.vocabulary,
              **per_token({name: x for name, x in batch.policy.items() if name in traced.moving})}
    constants = forward.Constants(head.targets.astype(jnp.int32), jnp.asarray(head.temperature, jnp.float32),
                                  head.support, per_token(block))
    thin = trace.lean(gate, traced, policy, {**batch.given, "mask": batch.mask})
    through = tuple(sorted(traced.moving))
    passes = gate_backward.Passes(*(functools.partial(run, thin, through, head.soft_cap)
                                    for run in (forward.values, forward.one_sweep)))
    return gate_backward.differentiable(passes, moving, jax.lax.stop_gradient(constants))


def _per_token(shape: tuple[int, int], x: Array) -> Array:
    return x if x.ndim == 0 else jnp.broadcast_to(x, shape).reshape(-1, 1)
