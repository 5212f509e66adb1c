"""In which shapes answers are drawn and learned from; what is computed stays the same."""
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """The config's section for answers whose lengths differ much. Tokens, weights and losses do not depend on it.

    Attributes:
      slots: answers that are drawn at once; where one ends, the next takes its slot. 0 draws all at once, until the
        longest has ended.
      length_buckets: shapes that the learner compiles, of T, T / 2, T / 4, ... completion positions; each micro-batch is
        cut to the shortest that holds its answers. 1 learns from whole rows. Compile time grows with their number.
      packed_rows: rows of T positions for each group, in which its answers lie end to end behind their shared prompt; a
        micro-batch whose answers do not fit is learned from unpacked. 0 gives every answer a row of its own, as do
        groups that have no more answers than this.
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

    def check_lengths(self, answer_positions: int, group_sizes: Sequence[int], seeds: Sequence[int], devices: int) -> None:
        """Refuses shapes that an experiment cannot learn in.

        Args:
          answer_positions: T, of the task.
          group_sizes, seeds: of each phase.
          devices: of the mesh.

        Raises:
          ValueError: naming the fields, what is allowed and what to do.
        """
        buckets, packed, largest = self.length_buckets, self.packed_rows, max(group_sizes)
        most = (answer_positions - 1).bit_length() + 1
        if buckets > most:
            raise ValueError(f"config.batching.length_buckets={buckets}, and answers of {answer_positions} positions have "
                             f"{most} different lengths of T, T / 2, T / 4, ...: take at most {most}.")
        if packed and packed >= largest:
            raise ValueError(f"config.batching.packed_rows={packed} leaves nothing to pack, for the largest group has "
                             f"{largest} answers: take fewer rows than that, or 0.")
        name = f"config.batching.packed_rows={packed}" if packed else f"config.batching.length_buckets={buckets}"
        if max(seeds) > 1 and (packed or buckets > 1):
            raise ValueError(f"{name}: scale.seeds={max(seeds)} replicas are computed as one, and each would compute every "
                             "shape: set length_buckets=1 and packed_rows=0, or seeds=1.")
        if packed and devices > 1:
            raise ValueError(f"{name}: packed rows are learned from on one device: set packed_rows=0, or every axis of "
                             "config.mesh to 1.")
