"""Two small checkpoints' tokenizers and what `transformers` says of them: tests/tasks/chatml/ and tests/tasks/headers/.

Command: python scripts/make_test_tokenizers.py --problems=train.jsonl --output=tests/tasks
Needs: GSM8K's training problems, pip install rl_jax[hf] tokenizers==0.23.3 transformers==5.24.0; a few seconds on one
CPU core; the same versions and problems give the same files.
"""
import dataclasses
import json
import pathlib
from typing import Any

from absl import app, flags

PROBLEMS = flags.DEFINE_string("problems", None, "GSM8K's train.jsonl.", required=True)
OUTPUT = flags.DEFINE_string("output", "tests/tasks", "The folder that the two folders are written to.")

ENTRIES, LINES = 480, 1000  # of the vocabulary before special tokens; problems that it is trained on
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CHATML = """\
{#- System turn with the tools, thinking kept behind the last question only, tool results as user turns. -#}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role != 'user' %}
        {%- continue %}
    {%- endif %}
    {%- set last.question = loop.index0 %}
{%- endfor %}
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content }}
        {{- '\\n\\n' if tools }}
    {%- endif %}
    {%- if tools %}
        {{- 'Functions that may be called:' }}
        {%- for tool in tools %}
            {{- '\\n' + tool | tojson }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content is defined and loop.index0 > last.question %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- raise_exception('no turn of the role ' + message.role + ' may stand here') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One tokenizer.

    Attributes:
      digits: how many form a token at most, as a regular expression's quantifier.
      composed: whether characters and their accents are joined first.
      special, added: tokens behind the vocabulary, special and not.
      begin: put in front of plain text.
      stops: generation_config.json's, in its order.
      config: the rest of tokenizer_config.json.
      template: that of chats; in a file of its own, or in the configuration beside another.
      in_file: which of the two.
    """

    digits: str
    composed: bool
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    begin: str = ""
    stops: tuple[str, ...]
    config: dict[str, Any]
    template: str
    in_file: bool


CHECKPOINTS = {
    "chatml": Checkpoint(
        digits="", composed=True, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        added=("<think>", "</think>", "<tool_call>", "</tool_call>"), stops=("<|im_end|>", "<|endoftext|>"),
        config={"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, template=CHATML,
        in_file=True),
    "headers": Checkpoint(
        digits="{1,3}", composed=False, begin="<|begin_of_text|>",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                 "<|eot_id|>"),
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), config={"clean_up_tokenization_spaces": True},
        template=HEADERS, in_file=False)}

TEXTS = (
    "", " ", "   ", "a", " a", "a ", "  two  spaces  ", "\n", "\n\n a\n", " \n \n  b", "\t\ttabs\t", "\r\n", "a\x00b",
    "Natalia sold 48/2 = 24 clips in May.\n#### 72", "1234567890 12 3", "$1,234.50 + 7%",
    "hello , world .  It 's don't", "é", "e\u0301", "A\u030angstro\u0308m ﬁ ½ ²", "ا\u0650ل\u064eع",
    "漢字かな交じり", "🙂👩\u200d👩\u200d👧🇩🇪", "\ufeffbom",
    "\u2028\u2029\u00a0\u3000x", "▁ ▁▁", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>  b<|endoftext|>",
    "<think>\n1 + 1\n</think>\n\n2", "<tool_call>\n{}\n</tool_call>x", "<|im_end", "<think", "< think >",
    "<|begin_of_text|>a<|eot_id|> b<|end_of_text|>", "<|start_header_id|>user<|end_header_id|>\n\nhi", "<s></s><pad>")

ASK = {"role": "user", "content": "How many clips are 48/2?"}
SYSTEM = {"role": "system", "content": "Answer in one number.\n"}
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "a + b, \"exactly\" <é>",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}}]
CALL = {"role": "assistant", "content": "", "reasoning_content": "\n24 and 48.\n", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 24, "b": 48}}}]}
RESULTS = [{"role": "tool", "content": "72"}, {"role": "tool", "content": "<|no error|>"}]
CHATS = {
    "question": {"messages": [ASK]},
    "system": {"messages": [SYSTEM, ASK]},
    "turns": {"messages": [SYSTEM, ASK, {"role": "assistant", "content": "24"},
                           {"role": "user", "content": "  And é?\t"}, {"role": "assistant", "content": "7 🙂"}]},
    "line end first": {"messages": [ASK, {"role": "assistant", "content": "\n24"}]},
    "special tokens inside": {"messages": [{"role": "user", "content": "a<|im_end|>\nb<|eot_id|>"}]}}
CHATML_CHATS = {
    "tools": {"messages": [ASK], "tools": TOOLS},
    "steps": {"messages": [SYSTEM, ASK, CALL, *RESULTS,
                           {"role": "assistant", "content": "72", "reasoning_content": "sum"}], "tools": TOOLS},
    "earlier thinking": {"messages": [
        ASK, {"role": "assistant", "content": "24", "reasoning_content": "half"}, {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "24 * 2 is 48", "tool_calls": None}]},
    "no thinking": {"messages": [ASK], "variables": {"enable_thinking": False}}}


def tokenizer_of(one: Checkpoint, texts: list[str]) -> Any:
    """Byte-level BPE trained on the texts, special tokens behind its entries."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    if one.composed:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS.format(digits=one.digits)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=ENTRIES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_special_tokens(list(one.special))
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in one.added])
    if one.begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{one.begin} $A", pair=f"{one.begin} $A {one.begin}:1 $B:1",
            special_tokens=[(one.begin, made.token_to_id(one.begin))])
    return made


def write(one: Checkpoint, made: Any, folder: pathlib.Path) -> None:
    """The files of a checkpoint's tokenizer, as published ones have them: older and newer ways."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"model_max_length": 4096, "tokenizer_class": "PreTrainedTokenizerFast", **one.config}
    if one.in_file:
        (folder / "chat_template.jinja").write_text(one.template, encoding="utf-8")
        config["added_tokens_decoder"] = {str(i): fields(token) for i, token in made.get_added_tokens_decoder().items()}
    else:
        config["chat_template"] = [{"name": "brief", "template": "{{ messages[-1]['content'] }}"},
                                   {"name": "default", "template": one.template}]
        put(folder / "special_tokens_map.json", {
            "bos_token": {"content": one.begin, "lstrip": False, "normalized": False, "rstrip": False,
                          "single_word": False}, "eos_token": "<|eot_id|>"})
    put(folder / "tokenizer_config.json", config)
    put(folder / "generation_config.json", {"eos_token_id": [made.token_to_id(text) for text in one.stops]})


def fields(token: Any) -> dict[str, Any]:
    """An added token as JSON has it."""
    return {"content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special}


def golden(one: Checkpoint, folder: pathlib.Path, chats: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of texts and chats; a text is what is decoded without the tokens that have none."""
    import transformers

    there = transformers.AutoTokenizer.from_pretrained(folder)
    silent = {there.convert_tokens_to_ids(text) for text in (*one.stops, one.begin or one.stops[0])}
    texts = []
    for text in TEXTS:
        ids = there(text, add_special_tokens=False)["input_ids"]
        spoken = there.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)
        texts.append({"text": text, "ids": ids, "plain": there(text)["input_ids"], "decoded": spoken})
    rendered = []
    for name, chat in chats.items():
        for prompt in (False, True):
            arguments = {"tools": chat.get("tools"), "add_generation_prompt": prompt, **chat.get("variables", {})}
            text = there.apply_chat_template(chat["messages"], tokenize=False, **arguments)
            made = there.apply_chat_template(chat["messages"], return_assistant_tokens_mask=one.in_file, **arguments)
            rendered.append({"name": name, **chat, "add_generation_prompt": prompt, "rendered": text,
                             "ids": made["input_ids"], "mask": made.get("assistant_masks")})
    return {"transformers": transformers.__version__, "size": len(there), "pad_id": there.pad_token_id,
            "eos_id": there.eos_token_id, "texts": texts, "chats": rendered}


def put(file: pathlib.Path, value: dict[str, Any]) -> None:
    """A JSON object with a line per field, and per entry of a list of objects."""
    lines = []
    for name, held in value.items():
        rows = isinstance(held, list) and held and isinstance(held[0], dict)
        text = "[\n" + ",\n".join(map(json.dumps, held)) + "]" if rows else json.dumps(held)
        lines.append(f"{json.dumps(name)}: {text}")
    file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def main(_):
    lines = pathlib.Path(PROBLEMS.value).read_text(encoding="utf-8").split("\n")[:LINES]
    questions = [json.loads(line)["question"] + "\n\n" for line in lines]
    for name, one in CHECKPOINTS.items():
        folder = pathlib.Path(OUTPUT.value) / name
        made = tokenizer_of(one, questions)
        write(one, made, folder)
        put(folder / "golden.json", golden(one, folder, CHATS | (CHATML_CHATS if name == "chatml" else {})))
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {made.get_vocab_size()} entries, {size} bytes")


if __name__ == "__main__":
    app.run(main)
