import dataclasses

import numpy as np

from rl_jax.tasks import judge
from rl_jax.tasks.toys import symbols


@dataclasses.dataclass(frozen=True)
class TwoEnds(symbols.Symbols):
    """Its first character ends an answer, too."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (symbols.END, symbols.FIRST)


TOKENS = np.array([[3, 1, 3, 2], [2, 1, 1, 1], [3, 4, 3, 4], [0, 3, 2, 2]])


def test_what_was_drawn_goes_up_to_the_first_of_the_stop_tokens():
    np.testing.assert_array_equal(judge.drawn_mask(TOKENS, (1, 2)).sum(axis=1), [2, 1, 4, 3])
    np.testing.assert_array_equal(judge.drawn_mask(TOKENS, (1,)).sum(axis=1), [2, 2, 4, 4])


def test_stop_tokens_have_no_text_whichever_of_them_ended_the_answer():
    tokenizer = TwoEnds("!ab")
    mask = judge.drawn_mask(TOKENS, tokenizer.stop_ids)
    assert judge.texts_of(tokenizer, TOKENS, mask) == ["a", "", "abab", "a"]
    assert judge.texts_of(symbols.Symbols("!ab"), TOKENS, np.ones_like(mask)) == ["aa!", "!", "abab", "a!!"]
