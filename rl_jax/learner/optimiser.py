"""The optimiser: AdamW behind a global-norm clip, with a schedule."""
import dataclasses
from collections.abc import Callable

import jax
import optax

DECAYS = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """The optimiser's numbers.

    Attributes:
      learning_rate: at its peak.
      warmup_steps: optimiser steps of linear rise from 0.
      decay: "constant", "linear" or "cosine", over the steps that remain.
      final_share: of the peak at the end of the decay.
      weight_decay: decoupled, on matrices only.
      clip_norm: global norm above which the gradient is scaled down; 0 switches it off.
      beta1, beta2, epsilon: Adam's.
      stop_after_skips: steps in a row without a finite gradient after which the run stops.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay: str = "constant"
    final_share: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    stop_after_skips: int = 10

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(f"optimiser decay={self.decay!r}: allowed are {DECAYS}.")
        if self.learning_rate <= 0 or self.clip_norm < 0 or self.warmup_steps < 0:
            raise ValueError(f"optimiser learning_rate={self.learning_rate}, clip_norm={self.clip_norm}, "
                             f"warmup_steps={self.warmup_steps}: learning_rate must be positive, the others not "
                             "negative.")
        if self.stop_after_skips < 1:
            raise ValueError(f"optimiser stop_after_skips={self.stop_after_skips}: must be at least 1.")


def learning_rate(numbers: Optimiser, steps: int) -> Callable:
    """The schedule: optimiser step -> learning rate.

    Args:
      steps: optimiser steps of the whole phase.
    """
    rest = max(steps - numbers.warmup_steps, 1)
    peak, final = numbers.learning_rate, numbers.learning_rate * numbers.final_share
    if numbers.decay == "constant":
        main = optax.constant_schedule(peak)
    elif numbers.decay == "linear":
        main = optax.linear_schedule(peak, final, rest)
    else:
        main = optax.cosine_decay_schedule(peak, rest, numbers.final_share)
    if numbers.warmup_steps == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, numbers.warmup_steps), main],
                                [numbers.warmup_steps])


def transform(numbers: Optimiser, steps: int) -> optax.GradientTransformation:
    """optax's chain: clip by global norm, AdamW on the schedule."""
    def matrices(parameters):  # by name, as the scales and biases of scanned layers are stacked to two axes
        return jax.tree_util.tree_map_with_path(
            lambda path, a: a.ndim >= 2 and getattr(path[-1], "key", None) not in ("scale", "bias"), parameters)

    adam = optax.adamw(learning_rate(numbers, steps), numbers.beta1, numbers.beta2, numbers.epsilon,
                       weight_decay=numbers.weight_decay, mask=matrices)
    clip = [optax.clip_by_global_norm(numbers.clip_norm)] if numbers.clip_norm else []
    return optax.chain(*clip, adam)
