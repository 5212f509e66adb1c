"""Tokenizers and chats side by side with `transformers`, on more texts than the golden files hold."""
import functools
import random

import pytest

from rl_jax.tasks import chat
from tests.tasks import checkpoints

pytestmark = pytest.mark.parity

RANGES = ((32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x2000, 0x2070), (0x3000, 0x3100),
          (0x4E00, 0x4F00), (0x1F300, 0x1F700))


@pytest.fixture(scope="module", params=checkpoints.NAMES)
def both(request):
    """A checkpoint's tokenizer as we read it, and as transformers does."""
    import transformers

    there = transformers.AutoTokenizer.from_pretrained(checkpoints.FOLDER / request.param)
    return checkpoints.load(request.param), there


def texts(there, count, seed=0):
    """Random text with special tokens, whole and cut short, in the middle of it."""
    draw = random.Random(seed)
    special = list(there.get_added_vocab())
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(12)):
            token, (low, high) = draw.choice(special), draw.choice(RANGES)
            parts.append(draw.choice((token, token[:-1], " ", "\n", "  ", "".join(
                chr(draw.randrange(low, high)) for _ in range(draw.randrange(6))))))
        yield "".join(parts)


def test_texts_have_the_same_ids_and_come_back_the_same(both):
    here, there = both
    silent = {*here.stop_ids, *here.begin_ids, here.pad_id}
    for text in texts(there, 500):
        ids = there(text, add_special_tokens=False)["input_ids"]
        assert here.encode(text) == ids, repr(text)
        assert [*here.begin_ids, *ids] == there(text)["input_ids"]
        assert here.decode(ids) == there.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)


def test_any_ids_are_spelled_the_same(both):
    here, there = both
    draw, silent = random.Random(1), {*here.stop_ids, *here.begin_ids, here.pad_id}
    for _ in range(200):
        ids = [draw.randrange(here.size + 20) for _ in range(10)]
        spoken = there.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)
        assert here.decode(ids) == spoken


def test_special_ids(both):
    here, there = both
    assert here.size == len(there) and there.eos_token_id in here.stop_ids
    assert here.pad_id == (there.eos_token_id if there.pad_token_id is None else there.pad_token_id)


def test_chats_of_random_turns_have_the_same_text_ids_and_mask(both):
    """The mask where the template marks what is generated and no answer begins with a line end."""
    here, there = both
    draw, words = random.Random(2), iter(texts(there, 2000, seed=3))
    stops = [here.token(i) for i in here.stop_ids]
    marks = "{%- generation %}" in there.chat_template
    for _ in range(100):
        messages = [{"role": "system", "content": next(words)}] * draw.randrange(2)
        for _ in range(draw.randrange(1, 4)):
            said = functools.reduce(lambda text, stop: text.replace(stop, ""), stops, next(words))
            messages += [{"role": "user", "content": next(words)}, {"role": "assistant", "content": said.lstrip()}]
        for prompt in (False, True):
            made = there.apply_chat_template(messages, add_generation_prompt=prompt, return_assistant_tokens_mask=marks)
            assert chat.Chat(here).ids(messages, add_generation_prompt=prompt) == made["input_ids"]
            assert chat.Chat(here).render(messages, add_generation_prompt=prompt) == there.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False)
        if marks:
            made = there.apply_chat_template(messages, return_assistant_tokens_mask=True)
            assert chat.Chat(here).masked(messages) == (made["input_ids"], [bool(i) for i in made["assistant_masks"]])


def test_tools_thinking_and_tool_results_have_the_same_text_and_ids(both):
    here, there = both
    name = "headers" if here.begin_ids else "chatml"
    for golden in checkpoints.golden(name)["chats"]:
        arguments = checkpoints.arguments(golden)
        assert here.template.render(golden["messages"], **arguments) == there.apply_chat_template(
            golden["messages"], tokenize=False, **arguments)
        assert chat.Chat(here).ids(golden["messages"], **arguments) == there.apply_chat_template(
            golden["messages"], **arguments)["input_ids"]
