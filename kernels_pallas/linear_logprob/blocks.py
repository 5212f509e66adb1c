"""Tile sizes, from the shape. Every number here was measured."""

SINGLE = 2048
SMALLEST = 1024
LARGEST = 8192


def vocabulary_tile(vocabulary_size: int) -> int:
    """Rows of the vocabulary per tile: a multiple of 32 (words of a support), or all of it."""
    if vocabulary_size <= SINGLE:
        return vocabulary_size
    share = 1 << (vocabulary_size // 32).bit_length() - 1
    return min(max(share, SMALLEST), LARGEST)
