import json
import pickle
import shutil
import sys

import pytest

from rl_jax.tasks import task, tokenizer
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer
from tests.tasks import checkpoints

TEXTS = [(name, text) for name in checkpoints.NAMES for text in checkpoints.golden(name)["texts"]]


def changed(tmp_path, name="chatml", without=(), **files):
    """A copy of a checkpoint without some fields of tokenizer_config.json, and with other files or fields of them."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints.FOLDER / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    files.setdefault("tokenizer_config", {})
    for file, fields in files.items():
        kept = {k: v for k, v in config.items() if k not in without} if file == "tokenizer_config" else {}
        (folder / f"{file}.json").write_text(json.dumps({**kept, **fields}))
    return folder


@pytest.mark.parametrize(("name", "golden"), TEXTS, ids=lambda one: repr(one["text"]) if isinstance(one, dict) else one)
def test_texts_have_the_ids_of_transformers_and_come_back_as_it_spells_them(name, golden):
    made = checkpoints.load(name)
    assert made.encode(golden["text"]) == golden["ids"]
    assert [*made.begin_ids, *golden["ids"]] == golden["plain"]
    assert made.decode(golden["ids"]) == golden["decoded"]


def test_special_ids_of_a_chat_checkpoint():
    made = checkpoints.load("chatml")
    assert isinstance(made, task.Tokenizer)
    end, pad = checkpoints.ids("chatml", "<|im_end|>", "<|endoftext|>")
    assert (made.end_id, made.pad_id, made.stop_ids, made.begin_ids) == (end, pad, (end, pad), ())
    assert made.size == checkpoints.golden("chatml")["size"] and made.pad_id == checkpoints.golden("chatml")["pad_id"]


def test_special_ids_where_turns_end_with_a_later_one_of_the_list():
    made = checkpoints.load("headers")
    begin, text, message, turn = checkpoints.ids(
        "headers", "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert (made.end_id, made.stop_ids, made.begin_ids) == (turn, (text, message, turn), (begin,))
    assert made.pad_id == turn, "without a padding token it is the end's"


def test_stop_begin_and_padding_tokens_have_no_text_and_others_do():
    made = checkpoints.load("chatml")
    header, think = checkpoints.ids("chatml", "<|im_start|>", "<think>")
    assert made.decode([*made.stop_ids, header, made.pad_id, think]) == "<|im_start|><think>"
    made = checkpoints.load("headers")
    assert made.decode([*made.begin_ids, *made.encode("a b"), *made.stop_ids]) == "a b"


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_every_id_has_a_text_and_those_of_a_padded_embedding_have_none(name):
    made = checkpoints.load(name)
    assert all(isinstance(made.decode([i]), str) for i in range(made.size))
    assert made.decode([made.size, 10**6]) == "" and made.decode([]) == ""
    assert made.decode([*made.encode("a"), made.size + 3, *made.encode("b")]) == "ab"


def test_half_a_character_is_replaced():
    made = checkpoints.load("chatml")
    assert made.decode(made.encode("漢")[:1]) == "\ufffd"


def test_it_can_be_sent_to_a_worker():
    made = pickle.loads(pickle.dumps(checkpoints.load("chatml")))
    assert made.encode("a<|im_end|>") == checkpoints.load("chatml").encode("a<|im_end|>")


def test_the_fingerprint_follows_vocabulary_template_and_stop_ids(tmp_path):
    same = CheckpointTokenizer(changed(tmp_path))
    assert same.fingerprint == checkpoints.load("chatml").fingerprint != checkpoints.load("headers").fingerprint
    prints = {same.fingerprint}
    prints.add(CheckpointTokenizer(changed(tmp_path, generation_config={"eos_token_id": 482})).fingerprint)
    folder = changed(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    prints.add(CheckpointTokenizer(folder).fingerprint)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    prints.add(CheckpointTokenizer(folder).fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(("config", "stops", "end"), [
    ({"eos_token_id": 480}, (480, 482), 482), ({"eos_token_id": [480, 482]}, (480, 482), 482),
    ({"eos_token_id": None}, (482,), 482), ({}, (482,), 482)])
def test_the_lists_of_end_tokens_are_united(tmp_path, config, stops, end):
    made = CheckpointTokenizer(changed(tmp_path, generation_config=config))
    assert (made.stop_ids, made.end_id) == (stops, end)


def test_without_a_chat_template_the_end_is_that_of_text(tmp_path):
    folder = changed(tmp_path, tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": None})
    assert CheckpointTokenizer(folder).end_id == checkpoints.ids("chatml", "<|im_end|>")[0]
    (folder / "chat_template.jinja").unlink()
    made = CheckpointTokenizer(folder)
    assert made.template is None and made.end_id == made.pad_id == checkpoints.ids("chatml", "<|endoftext|>")[0]


@pytest.mark.parametrize("source", ["{{ raise_exception('no chats') }}", "{{ messages[1].content }}.",
                                    "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"])
def test_a_template_that_ends_turns_with_no_stop_token(tmp_path, source):
    folder = changed(tmp_path, tokenizer_config={"eos_token": "<|endoftext|>"})
    (folder / "chat_template.jinja").write_text(source)
    assert CheckpointTokenizer(folder).end_id == checkpoints.ids("chatml", "<|endoftext|>")[0]


def test_templates_by_name_and_in_the_configuration(tmp_path):
    named = checkpoints.load("headers").template.source
    folder = changed(tmp_path, "headers", tokenizer_config={"chat_template": named})
    assert CheckpointTokenizer(folder).template.source == named
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert CheckpointTokenizer(folder).template.source == "{{ messages[0]['content'] }}", "the file counts"


def test_tokens_that_only_the_configuration_adds(tmp_path):
    """As transformers: they get the ids that it says, and are found in texts."""
    added = json.loads((checkpoints.FOLDER / "chatml" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    extra = {"content": "<|extra|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}
    made = CheckpointTokenizer(changed(tmp_path, tokenizer_config={"added_tokens_decoder": {**added, "487": extra}}))
    assert made.encode("a<|extra|>")[-1] == 487 and made.size == 488
    with pytest.raises(ValueError, match=r"added_tokens_decoder.*'<\|extra\|>' the id 500, and tokenizer.json 487"):
        CheckpointTokenizer(changed(tmp_path, tokenizer_config={"added_tokens_decoder": {**added, "500": extra}}))


def test_special_tokens_may_be_read_as_text(tmp_path):
    made = CheckpointTokenizer(changed(tmp_path, tokenizer_config={"split_special_tokens": True}))
    assert len(made.encode("<|im_end|>")) > 1


def test_limits_in_the_file_do_not_count(tmp_path):
    folder = changed(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "!"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = checkpoints.golden("chatml")["texts"][13]
    assert CheckpointTokenizer(folder).encode(text["text"]) == text["ids"]


@pytest.mark.parametrize(("without", "files", "named"), [
    ((), {"generation_config": {"eos_token_id": [482, 487]}}, r"generation_config.json: eos_token_id has \[487\].*486"),
    ((), {"generation_config": {"eos_token_id": "x"}}, r"generation_config.json: eos_token_id has \['x'\]"),
    (("eos_token",), {"generation_config": {}}, "neither eos_token_id in generation_config.json nor eos_token in"),
    ((), {"tokenizer_config": {"eos_token": "<end>"}}, "eos_token='<end>' in tokenizer_config.json.*not in the voc"),
    ((), {"tokenizer_config": {"pad_token": "[PAD]"}}, r"pad_token='\[PAD\]' in tokenizer_config.json"),
    ((), {"tokenizer_config": {"eos_token": 482}}, "eos_token in tokenizer_config.json.* is 482"),
    ((), {"tokenizer_config": {"added_tokens_decoder": {"1": {"text": "a"}}}}, "added_tokens_decoder in tokenizer_"),
    ((), {"tokenizer": {"model": 1}}, "tokenizer.json is no tokenizer of the tokenizers library")])
def test_what_is_wrong_is_named_by_file_and_field(tmp_path, without, files, named):
    with pytest.raises(ValueError, match=named):
        CheckpointTokenizer(changed(tmp_path, without=without, **files))


@pytest.mark.parametrize(("template", "named"), [
    (5, "chat_template in tokenizer_config.json is a int"),
    ([{"name": "a", "template": "b"}], r"templates named \['a'\] and none named 'default'"),
    ("{% if %}", "chat template of .*copy is no Jinja template")])
def test_a_wrong_template_is_named(tmp_path, template, named):
    with pytest.raises(ValueError, match=named):
        CheckpointTokenizer(changed(tmp_path, "headers", tokenizer_config={"chat_template": template}))


def test_files_that_are_missing_or_no_json(tmp_path):
    folder = changed(tmp_path)
    for name, text, named in (("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
                              ("generation_config.json", "[1]", "generation_config.json holds a list: expected an")):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=named):
            CheckpointTokenizer(folder)
        (folder / name).write_text(before)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no .*tokenizer.json.*SentencePiece"):
        CheckpointTokenizer(folder)


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install rl_jax\[hf\]"):
        CheckpointTokenizer(checkpoints.FOLDER / "chatml")


def test_load_takes_a_folder_or_an_id(monkeypatch):
    folder = checkpoints.FOLDER / "headers"
    assert tokenizer.load(str(folder)).fingerprint == checkpoints.load("headers").fingerprint
    monkeypatch.setattr(tokenizer.hub, "folder", {"owner/name": folder}.get)
    assert tokenizer.load("owner/name").fingerprint == checkpoints.load("headers").fingerprint


def test_a_name_none_or_a_tokenizer_is_resolved():
    made = checkpoints.load("chatml")
    assert tokenizer.resolved(made) is made
    assert tokenizer.resolved(str(checkpoints.FOLDER / "chatml")).fingerprint == made.fingerprint
    assert tokenizer.resolved("").fingerprint == tokenizer.resolved(None).fingerprint == tokenizer.load().fingerprint


def test_begin_tokens_stand_in_front_of_plain_prompts():
    made = checkpoints.load("headers")
    assert task.encoded_prompt(made, "a b", 9) == [*made.begin_ids, *made.encode("a b")]
    with pytest.raises(ValueError, match="3 tokens and prompt_length allows 1 to 2"):
        task.encoded_prompt(made, "a b", 2)
