"""In which shapes answers are drawn and learned from; what is computed stays the same."""
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """The config's section for answers whose lengths differ much. Tokens, weights and losses do not depend on it.

    Attributes:
      slots: answers that are drawn at once; where one ends, the next takes its slot. 0 draws all at once, until the
        longest has ended.
      length_buckets: shapes that the learner compiles, of T, T / 2, T / 4, ... completion positions; a batch is cut to
        the shortest that holds its answers. 1 learns from whole rows.
      packed_rows: the learner's rows per step, each of several completions of a group behind their shared prompt; 0
        gives every completion a row of its own.
    """

    slots: int = 0
    length_buckets: int = 1
    packed_rows: int = 0

    def __post_init__(self):
        for name, least in (("slots", 0), ("length_buckets", 1), ("packed_rows", 0)):
            if vars(self)[name] < least:
                raise ValueError(f"config.batching.{name}={vars(self)[name]}: must be at least {least}.")

    def check_slots(self, drawing: Sequence[tuple[str, int, int]], devices: int) -> None:
        """Refuses slots that a phase cannot draw with.

        Args:
          drawing: of each phase that draws answers: the recipe's name, its rollout's window, and how many answers it
            draws at once.
          devices: the most that a mesh cuts the answers over.

        Raises:
          ValueError: naming the fields, what is allowed and what to do.
        """
        if not self.slots:
            return
        name = f"config.batching.slots={self.slots}"
        if not drawing:
            raise ValueError(f"{name} says how many answers are drawn at once, and no phase draws any: set it to 0.")
        if devices > 1:
            raise ValueError(f"{name}: a mesh of {devices} devices cuts all answers of a step. Set slots to 0, or every "
                             "axis of config.mesh to 1 and config.asynchronous.sampler_devices to 1 at most.")
        for recipe, window, answers in drawing:
            if window:
                raise ValueError(f"{name}: recipe {recipe!r} draws in windows (rollout.window={window}), which keep a "
                                 "place for every answer: set slots to 0, or window=0.")
            if self.slots > answers:
                raise ValueError(f"{name}: recipe {recipe!r} draws scale.prompts_per_step x group_size = {answers} answers: "
                                 "take no more slots than answers, or 0 to draw all at once.")
