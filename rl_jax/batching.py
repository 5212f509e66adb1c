"""In which shapes answers are drawn and learned from; what is computed stays the same."""
import dataclasses


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

    def check(self, *, answer_positions: int, group_size: int, seeds: int, devices: int) -> None:
        """Refuses what does not go together with the rest of an experiment.

        Args:
          answer_positions: T, of the task.
          group_size, seeds: the largest of all phases.
          devices: of the mesh.

        Raises:
          ValueError: naming the fields, what is allowed and what to do.
        """
        buckets, packed = self.length_buckets, self.packed_rows
        most = (answer_positions - 1).bit_length() + 1
        if buckets > most:
            raise ValueError(f"config.batching.length_buckets={buckets}, and answers of {answer_positions} positions have "
                             f"{most} different lengths of T, T / 2, T / 4, ...: take at most {most}.")
        if packed and packed >= group_size:
            raise ValueError(f"config.batching.packed_rows={packed} leaves nothing to pack, for the largest group has "
                             f"{group_size} answers: take fewer rows than that, or 0.")
        name = f"config.batching.packed_rows={packed}" if packed else f"config.batching.length_buckets={buckets}"
        if seeds > 1 and (packed or buckets > 1):
            raise ValueError(f"{name}: scale.seeds={seeds} replicas are computed as one, and each would compute every "
                             "shape: set length_buckets=1 and packed_rows=0, or seeds=1.")
        if packed and devices > 1:
            raise ValueError(f"{name}: packed rows are learned from on one device: set packed_rows=0, or every axis of "
                             "config.mesh to 1.")
