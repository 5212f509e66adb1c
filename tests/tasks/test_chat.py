import json
import shutil

import pytest
import tokenizers

from rl_jax.tasks import chat, tokenizer
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer
from tests.tasks import checkpoints

GOLDEN = [(name, one) for name in checkpoints.NAMES for one in checkpoints.golden(name)["chats"]]
REWRITTEN = ("earlier thinking",)
ASK, SYSTEM = {"role": "user", "content": "1 + 1?"}, {"role": "system", "content": "Count."}
SAID, MORE = {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure? é"}


def named(one):
    return f"{one['name']}-{one['add_generation_prompt']}" if isinstance(one, dict) else one


def made(tmp_path, template, **generation):
    """A chat with another template than the checkpoint's, or other end tokens."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints.FOLDER / "chatml", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return chat.Chat(CheckpointTokenizer(folder))


def of(name):
    return chat.Chat(checkpoints.load(name))


def pieces(name, ids, mask):
    """The text of each run of tokens that are, or are not, the policy's."""
    runs = []
    for i, chosen in zip(ids, mask, strict=True):
        if not runs or runs[-1][1] != chosen:
            runs.append(([], chosen))
        runs[-1][0].append(i)
    spell = checkpoints.load(name)._tokenizer
    return [(spell.decode(run, skip_special_tokens=False), chosen) for run, chosen in runs]


@pytest.mark.parametrize(("name", "golden"), GOLDEN, ids=named)
def test_chats_have_the_ids_of_transformers(name, golden):
    arguments = checkpoints.arguments(golden)
    assert of(name).render(golden["messages"], **arguments) == golden["rendered"]
    assert of(name).ids(golden["messages"], **arguments) == golden["ids"]


@pytest.mark.parametrize("golden", [one for name, one in GOLDEN if name == "chatml" and one["name"] not in (
    *REWRITTEN, "line end first") and not one["add_generation_prompt"]], ids=named)
def test_the_mask_is_what_the_template_marks_as_generated(golden):
    """The oracle is transformers' mask of those blocks; this one reads generation prompts instead."""
    arguments = {k: v for k, v in checkpoints.arguments(golden).items() if k != "add_generation_prompt"}
    ids, mask = of("chatml").masked(golden["messages"], **arguments)
    assert ids == golden["ids"] and mask == [bool(one) for one in golden["mask"]]


def test_only_what_an_assistant_wrote_and_its_end_is_chosen():
    messages = [SYSTEM, ASK, SAID, MORE, {"role": "assistant", "content": "Yes <|x|>"}]
    ids, mask = of("headers").masked(messages)
    assert ids == of("headers").ids(messages)
    assert pieces("headers", ids, mask) == [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCount.<|eot_id|><|start_header_id|>user"
         "<|end_header_id|>\n\n1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("2<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nSure? é<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
         "\n\n", False), ("Yes <|x|><|eot_id|>", True)]


def test_thinking_and_calls_are_chosen_and_tool_results_are_not():
    (golden,) = (one for name, one in GOLDEN if one["name"] == "steps" and not one["add_generation_prompt"])
    runs = pieces("chatml", *of("chatml").masked(golden["messages"], tools=golden["tools"]))
    assert [text for text, chosen in runs if chosen] == [
        "<think>\n24 and 48.\n</think>\n\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 24, \"b\": 48}}\n"
        "</tool_call><|im_end|>", "<think>\nsum\n</think>\n\n72<|im_end|>"]
    assert runs[2][0].startswith("\n<|im_start|>user\n<tool_response>\n72")


def test_a_line_end_that_begins_an_answer_is_a_token_of_its_own():
    """Rendered at once it joins the header's; after the generation prompt it cannot."""
    (golden,) = (one for name, one in GOLDEN if (name, one["name"], one["add_generation_prompt"]) == (
        "chatml", "line end first", False))
    ids, mask = of("chatml").masked(golden["messages"])
    prompt = of("chatml").ids(golden["messages"][:1], add_generation_prompt=True)
    assert len(ids) == len(golden["ids"]) + 1 and ids[: len(prompt)] == prompt
    assert pieces("chatml", ids, mask)[1:] == [("\n24<|im_end|>", True), ("\n", False)]
    assert mask[: len(prompt)] == [False] * len(prompt)


def test_an_answer_that_spells_a_stop_token_ends_there():
    for stop in ("<|im_end|>", "<|endoftext|>"):
        messages = [ASK, {"role": "assistant", "content": f"2{stop} and 3"}]
        ids, mask = of("chatml").masked(messages)
        assert ids == of("chatml").ids(messages)
        assert [text for text, chosen in pieces("chatml", ids, mask) if chosen] == [f"2{stop}"]


def test_a_chat_without_an_assistant_has_nothing_chosen():
    ids = of("chatml").ids([SYSTEM, ASK])
    assert of("chatml").masked([SYSTEM, ASK]) == (ids, [False] * len(ids))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    (golden,) = (one for name, one in GOLDEN if one["name"] == "earlier thinking" and one["add_generation_prompt"])
    with pytest.raises(ValueError, match="message 1: the chat template rewrites.*Chat.continuation"):
        of("chatml").masked(golden["messages"])
    ids, mask = of("chatml").masked(golden["messages"][:2])
    drawn = [text for text, chosen in pieces("chatml", ids, mask) if chosen]
    assert drawn == ["<think>\nhalf\n</think>\n\n24<|im_end|>"]


def test_a_turn_that_is_not_rendered_behind_its_generation_prompt_is_refused():
    with pytest.raises(ValueError, match=r"message 1: .*not render this .*in '.*</think>\\n\\n'.*Chat.continuation"):
        of("chatml").masked([ASK, SAID], enable_thinking=False)


def test_a_turn_without_a_stop_token_is_refused(tmp_path):
    source = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(ValueError, match=r"ends an assistant turn with '2;', where none of the stop .*<\|im_end"):
        made(tmp_path, source).masked([ASK, SAID])
    with pytest.raises(ValueError, match=r"none of the stop tokens"):
        made(tmp_path, source).continuation([MORE])


@pytest.mark.parametrize("name", checkpoints.NAMES)
@pytest.mark.parametrize("first", [[ASK], [SYSTEM, ASK]])
@pytest.mark.parametrize("second", [[MORE], [MORE, {"role": "system", "content": "s"}, ASK]], ids=len)
def test_begin_answer_and_continuation_are_the_chat_at_once(name, first, second):
    """Three turns; where the template takes the roles it does not rewrite them."""
    if name == "chatml":
        second = second[:1]
    one, end = of(name), checkpoints.load(name).end_id
    drawn = [*checkpoints.load(name).encode("2"), end]
    ids = [*one.ids(first, add_generation_prompt=True), *drawn, *one.continuation(second)]
    assert ids == one.ids([*first, SAID, *second], add_generation_prompt=True)
    again = [*ids, *drawn, *one.continuation([ASK])]
    assert again == one.ids([*first, SAID, *second, SAID, ASK], add_generation_prompt=True)


def test_words_marked_by_a_space_before_them(tmp_path):
    """As SentencePiece models have it: what stands first gets a space, what stands behind a special token does not."""
    letters = "▁qa12?"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "chat_template": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'q' + m.content + 'a' if m.role == 'user' else ' ' + m.content + '</s>' }}{% endfor %}")}))
    one = chat.Chat(CheckpointTokenizer(tmp_path))
    first, second = {"role": "user", "content": "1"}, {"role": "user", "content": " 2"}
    ids, mask = one.masked([first, {"role": "assistant", "content": "1"}, second, SAID])
    assert ids == [6, *(letters.index(c) for c in "q1a▁1"), 7, *(letters.index(c) for c in "q▁2a▁2"), 7]
    assert [i for i, chosen in zip(ids, mask, strict=True) if chosen] == [0, 3, 7, 0, 4, 7]
    drawn = ids[4:7]
    assert [*one.ids([first]), *drawn, *one.continuation([second])] == ids[:-3]


def test_continuing_with_tool_results_keeps_the_drawn_ids():
    (golden,) = (one for name, one in GOLDEN if one["name"] == "steps" and not one["add_generation_prompt"])
    one, messages = of("chatml"), golden["messages"]
    first = one.ids(messages[:2], tools=golden["tools"], add_generation_prompt=True)
    whole, mask = one.masked(messages[:3], tools=golden["tools"])
    drawn = [i for i, chosen in zip(whole, mask, strict=True) if chosen]
    behind = one.continuation(messages[3:5])
    assert [*first, *drawn, *behind] == one.ids(messages[:5], tools=golden["tools"], add_generation_prompt=True)
    assert behind == one.continuation(messages[3:5], tools=golden["tools"])


def test_continuing_where_earlier_thinking_would_be_dropped():
    """The answer that was drawn keeps its thinking; the rest is as the template has it."""
    text = checkpoints.load("chatml")._tokenizer.decode(of("chatml").continuation([MORE]), skip_special_tokens=False)
    assert text == "\n<|im_start|>user\nSure? é<|im_end|>\n<|im_start|>assistant\n"
    text = checkpoints.load("chatml")._tokenizer.decode(
        of("chatml").continuation([MORE], enable_thinking=False), skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_continuation_that_the_template_refuses():
    with pytest.raises(ValueError, match="no turn of the role system may stand here"):
        of("chatml").continuation([SYSTEM])


def test_a_checkpoint_without_a_template(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints.FOLDER / "chatml", folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        chat.Chat(CheckpointTokenizer(folder))


def test_a_question_as_a_chat_or_in_plain_text():
    shipped, checkpoint = tokenizer.load(), checkpoints.load("chatml")
    assert chat.prompt(shipped, "1 + 1?", None, 20) == (shipped.encode("1 + 1?"), "1 + 1?")
    begun = checkpoints.load("headers")
    assert chat.prompt(begun, "1 + 1?", None, 20)[0] == [*begun.begin_ids, *begun.encode("1 + 1?")]
    ids, text = chat.prompt(checkpoint, "1 + 1?", {}, 50)
    assert text == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n" and ids == checkpoint.encode(text)
    settings = {"system": "Count.", "instruction": "Answer behind ####.", "enable_thinking": False}
    ids, text = chat.prompt(checkpoint, "1 + 1?", settings, 90)
    assert ids == of("chatml").ids([SYSTEM, {"role": "user", "content": "1 + 1?\nAnswer behind ####."}],
                                   add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<think>\n\n</think>\n\n")


def test_questions_that_cannot_be_asked_as_a_chat():
    with pytest.raises(ValueError, match=r"chat=\{\} needs the tokenizer of a published checkpoint"):
        chat.prompt(tokenizer.load(), "1?", {}, 9)
    with pytest.raises(ValueError, match=r"chat has \{'system': 3\}"):
        chat.prompt(checkpoints.load("chatml"), "1?", {"system": 3}, 9)
    with pytest.raises(ValueError, match="tokens and prompt_length allows 1 to 5: '<.im_start.>user"):
        chat.prompt(checkpoints.load("chatml"), "1?", {}, 5)
