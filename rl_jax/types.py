"""The axes and records that travel along the data path.

Axes: `P` prompts, `G` samples per prompt, `N = P * G` sequences (prompt-major), `S` prompt
positions, `T` completion positions, `V` vocabulary, `D` width, `W = ceil(V / 32)` words of a
bit mask over the vocabulary. Log-probabilities and entropies are in nats, float32.
"""
import types
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from rl_jax.record import record

Tokens = Float[Array, "N T"]
Mask = Bool[Array, "N T"]
PerSequence = Float[Array, " N"]
Group = Int[Array, " N"]
Scalar = int | float | Float[Array, ""]
Bound = Scalar | Float[Array, "N T"]
Parameters = Any


@record
class Prompts:
    """What is asked: right-padded token ids and what the verifier needs to know.

    `facts` are arrays with leading axis P that a pure verifier reads. `answer` is a given
    completion, for recipes that learn from answers instead of drawing them. `routes` are the
    experts of the prompts' tokens, where they are replayed. The stream makes them of NumPy arrays;
    the loop places them on devices.
    """

    tokens: Int[Array | np.ndarray, "P S"]
    lengths: Int[Array | np.ndarray, " P"]
    example: Int[Array | np.ndarray, " P"]
    domain: Int[Array | np.ndarray, " P"]
    facts: dict[str, Any]
    answer: Int[Array | np.ndarray, "P T"] | None = None
    answer_mask: Bool[Array | np.ndarray, "P T"] | None = None
    routes: Shaped[Array, "P S L k"] | None = None


@record
class Samples:
    """What was drawn. `mask` is True where the policy chose the token, its end token included.

    `finished` says the end token was drawn (otherwise the answer was cut off at T); `version`
    counts the updates of the weights that drew it (its newest tokens, where it grew over several
    steps). `rollout_entropy` is that of the distribution before any factor of the token's own
    temperature. `support` marks, as bits, the tokens that truncated sampling kept; None when the
    whole vocabulary could be drawn. Further fields are None where they would say nothing:
    `complete`, the answer does not go on in the next step (None: all are); `fresh`, tokens drawn in
    this step (None: all that are chosen); `given`, the answer was given and not drawn (None: none
    was); `turn`, the number of each token's turn, from 0 (None: one turn); `routes` and
    `prompt_routes`, the `k` experts that each token went through in each of `L` mixing layers (None:
    the network mixes none).
    """

    tokens: Int[Array, "N T"]
    mask: Bool[Array, "N T"]
    rollout_logp: Float[Array, "N T"]
    rollout_entropy: Float[Array, "N T"]
    finished: Bool[Array, " N"]
    version: Int[Array, " N"]
    support: UInt32[Array, "N T W"] | None = None
    complete: Bool[Array, " N"] | None = None
    fresh: Bool[Array, "N T"] | None = None
    given: Bool[Array, " N"] | None = None
    turn: Int[Array, "N T"] | None = None
    routes: Shaped[Array, "N T L k"] | None = None
    prompt_routes: Shaped[Array, "P S L k"] | None = None


@record
class Verdict:
    """What the verifier said: score (1 is correct), further parts by name, and where it failed.

    A verifier that raised, ran out of time or returned no finite number has failed; its score is not read.
    """

    score: Float[Array | np.ndarray, " N"]
    parts: dict[str, Any]
    failed: Bool[Array | np.ndarray, " N"]


@record
class Experience:
    """Samples and what is known about them: everything that a recipe's slots may read.

    `score` is what the task's verifier said, `reward` what the recipe's reward slot made of it.
    `group` numbers the prompts; a sequence whose verifier failed is alone in a group of its own
    (ids up to 2N - 1), so group statistics never see it, and its mask is False.
    `given` holds what only some recipes ask for (`Recipe.models`) or a stage has computed; its
    entries are read by name (`x.reference_logp`), and reading one that is not there says why.
    `example` and `domain` are the ids of each sequence's prompt and of its part of the task; `seed`
    is a random number of each sequence's own, for slots that draw lots. `complete`, `fresh`, `turn`:
    see `Samples`. `marks` and `views` are what the slots of those names made; `routes` are
    there where the experts are replayed (`Recipe.routing`), those of the prompts in `prompts`. `row` is the row of
    the drawn batch that each row was taken from, where selection resampled. `segment` says which answer each token
    belongs to where several share a row, -1 for padding; only networks are given such rows.
    """

    tokens: Int[Array, "N T"]
    mask: Bool[Array, "N T"]
    rollout_logp: Float[Array, "N T"]
    rollout_entropy: Float[Array, "N T"]
    finished: Bool[Array, " N"]
    version: Int[Array, " N"]
    score: Float[Array, " N"]
    reward: Float[Array, " N"]
    group: Int[Array, " N"]
    parts: dict[str, Any]
    failed: Bool[Array, " N"]
    given: dict[str, Any]
    example: Int[Array, " N"] | None = None
    domain: Int[Array, " N"] | None = None
    seed: UInt32[Array, " N"] | None = None
    complete: Bool[Array, " N"] | None = None
    fresh: Bool[Array, "N T"] | None = None
    turn: Int[Array, "N T"] | None = None
    row: Int[Array, " N"] | None = None
    segment: Int[Array, "N T"] | None = None
    routes: Shaped[Array, "N T L k"] | None = None
    prompts: Prompts | None = None
    support: UInt32[Array, "N T W"] | None = None
    marks: dict[str, Any] | None = None
    views: dict[str, Any] | None = None
    coefficients: dict[str, Any] | None = None

    def _read(self, name: str, remedy: str) -> Tokens:
        if name not in self.given:
            raise ValueError(f"x.{name} is not there: {remedy} (there are: {sorted(self.given) or 'none'}).")
        return self.given[name]

    @property
    def old_logp(self) -> Tokens:
        """Log-probability under the learner's weights before this batch, in nats."""
        return self._read("old_logp", 'the recipe must ask for it with models=("old",)')

    @property
    def reference_logp(self) -> Tokens:
        """Log-probability under the frozen reference, in nats."""
        return self._read("reference_logp", 'the recipe must ask for it with models=("reference",)')

    @property
    def teacher_logp(self) -> Tokens:
        """Log-probability under the teacher, in nats."""
        return self._read("teacher_logp", 'the recipe must ask for it with models=("teacher",)')

    @property
    def values(self) -> Tokens:
        """The critic's values before this batch, in reward units."""
        return self._read("values", 'the recipe must ask for it with models=("critic",)')

    @property
    def advantage(self) -> Tokens:
        """What the advantage slot returned, one number per token, constant in the weights."""
        return self._read("advantage", "the recipe has no advantage slot, or it has not run yet")

    @property
    def second_moment(self) -> Tokens:
        """sum_v p_v^2 of each token's distribution under the policy before this batch."""
        return self._read("second_moment", 'the recipe must ask for it with models=("moments",)')

    @property
    def third_moment(self) -> Tokens:
        """sum_v p_v^3 of each token's distribution under the policy before this batch."""
        return self._read("third_moment", 'the recipe must ask for it with models=("moments",)')

    @property
    def hidden_square(self) -> Tokens:
        """Squared norm of the hidden state that each token was drawn from, before this batch."""
        return self._read("hidden_square", 'the recipe must ask for it with models=("moments",)')

    @property
    def mark(self) -> types.SimpleNamespace:
        """What the recipe's `marks` slot said of each token, by name."""
        return types.SimpleNamespace(**(self.marks or {}))

    @property
    def view(self) -> types.SimpleNamespace:
        """Log-probability of the drawn tokens under other prompts (`Recipe.views`), by name, in nats."""
        return types.SimpleNamespace(**(self.views or {}))

    @property
    def coefficient(self) -> types.SimpleNamespace:
        """The recipe's adapting coefficients (`Schedule.controls`) by name."""
        return types.SimpleNamespace(**(self.coefficients or {}))


@record
class Evaluated:
    """What the policy says of the drawn tokens now; differentiable."""

    logp: Float[Array, "N T"]
    entropy: Float[Array, "N T"]
    values: Float[Array, "N T"] | None = None


@record
class TrainState:
    """Everything that an update reads and writes, one replica.

    `step` counts updates of the program, `parameters` holds what is trained by role (policy,
    critic), `optimiser` is optax's state, `frozen` holds the weights that are never trained by role
    (reference, teacher; "policy", the part of it that is kept, where not all is trained), `control`
    the state of the recipe's adapting coefficients, `skipped` counts steps in a row whose gradient was not finite,
    `carried` holds rollouts of earlier steps that are learned from again or not yet complete.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    parameters: Parameters
    optimiser: Any
    frozen: dict[str, Parameters]
    control: dict[str, Any]
    skipped: Int[Array, ""]
    carried: dict[str, Any]
