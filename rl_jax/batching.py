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
