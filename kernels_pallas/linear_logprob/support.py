"""Which tokens truncated sampling kept, one bit per token of the vocabulary."""
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

WORD = 32


def words_for(vocabulary_size: int) -> int:
    """ceil(V / 32): words that hold one bit per token."""
    return -(-vocabulary_size // WORD)


def pack_support(kept: Bool[Array, "... V"]) -> UInt32[Array, "... W"]:
    """Bit v % 32 of word v // 32 is kept[v]; bits beyond the vocabulary are 0."""
    words = words_for(kept.shape[-1])
    missing = words * WORD - kept.shape[-1]
    padded = jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, missing)])
    bits = padded.reshape(*kept.shape[:-1], words, WORD).astype(jnp.uint32)
    return (bits << _positions(bits.ndim)).sum(axis=-1, dtype=jnp.uint32)


def unpack_support(words: UInt32[Array, "... W"], vocabulary_size: int) -> Bool[Array, "... V"]:
    """kept[v] is bit v % 32 of word v // 32.

    Args:
      words: from `pack_support`.
      vocabulary_size: V, in tokens; at most 32 per word.
    """
    bits = (words[..., None] >> _positions(words.ndim + 1)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :vocabulary_size] == 1


def _positions(rank: int) -> UInt32[Array, "..."]:
    return jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * (rank - 1) + (WORD,))
