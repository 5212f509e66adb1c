"""The tokenizer of a published checkpoint, from the files beside its weights."""
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rl_jax import hub
from rl_jax.tasks import template

PROBE = "\ue000"  # an assistant's words, to see what the chat template puts behind them


class CheckpointTokenizer:
    """Text to the ids that `transformers` gives it, and back.

    Read are tokenizer.json, tokenizer_config.json, generation_config.json, special_tokens_map.json
    and chat_template.jinja; all but the first may be missing.

    Attributes:
      size: the largest id plus one; an embedding may be padded beyond it.
      pad_id: the padding token, or the end of text where there is none.
      end_id: the stop token that the chat template ends an assistant's turn with; without such a
        template, or where it ends turns with something else, the end of text.
      stop_ids: the end tokens of generation_config.json and that of tokenizer_config.json.
      begin_ids: what the tokenizer itself puts in front of plain text.
      fingerprint: a digest of the vocabulary, the template and the special tokens.
      template: the chat template; None if the checkpoint has none.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads a checkpoint's folder.

        Raises:
          ValueError: for a file that is missing or is not what it should be, naming it and the field.
        """
        self._folder = folder
        config = _config(folder)
        self._tokenizer, vocabulary = _backend(folder, config)
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        special = _special_tokens(folder, config)
        eos = self._id_of(special, "eos_token")
        listed = self._listed_ends()
        self.stop_ids = tuple(dict.fromkeys((*listed, *(() if eos is None else (eos,)))))
        if not self.stop_ids:
            raise ValueError(f"{folder}: neither eos_token_id in generation_config.json nor eos_token in "
                             "tokenizer_config.json is given: nothing would end an answer. Add one of them.")
        source = _template_source(folder, config)
        self.template = None if source is None else template.Template(source, special, f"the chat template of {folder}")
        turn_end = self._turn_end()
        self.end_id = next(one for one in (turn_end, eos, self.stop_ids[0]) if one is not None)
        pad = self._id_of(special, "pad_token")
        self.pad_id = next(one for one in (pad, eos, self.stop_ids[0]) if one is not None)
        self.begin_ids = self._begin()
        self._silent = {*self.stop_ids, *self.begin_ids, self.pad_id}
        told = json.dumps([source, self.stop_ids, special, config.get("added_tokens_decoder")], sort_keys=True)
        self.fingerprint = hashlib.sha256(vocabulary + told.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens; special tokens that it spells out are those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; stop, begin and padding tokens have none, nor have ids beyond the vocabulary."""
        return self._tokenizer.decode([i for i in ids if i not in self._silent], skip_special_tokens=False)

    def token(self, i: int) -> str:
        """How the vocabulary spells an id; for special tokens that is their text."""
        return self._tokenizer.id_to_token(i)

    def _id_of(self, special: Mapping[str, str], name: str) -> int | None:
        if name not in special:
            return None
        found = self._tokenizer.token_to_id(special[name])
        if found is None:
            raise ValueError(f"{self._folder}: {name}={special[name]!r} in tokenizer_config.json or "
                             "special_tokens_map.json is not in the vocabulary of tokenizer.json.")
        return found

    def _listed_ends(self) -> tuple[int, ...]:
        file = self._folder / "generation_config.json"
        listed = _read(file).get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        wrong = [i for i in listed if type(i) is not int or self._tokenizer.id_to_token(i) is None]
        if wrong:
            raise ValueError(f"{file}: eos_token_id has {wrong}: allowed are ids of tokenizer.json, 0 to "
                             f"{self.size - 1}.")
        return tuple(listed)

    def _turn_end(self) -> int | None:
        """The stop token that comes first behind an assistant's words; None if the template shows none."""
        if self.template is None:
            return None
        messages = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": PROBE}]
        try:
            _, _, behind = self.template.render(messages).rpartition(PROBE)
        except ValueError:  # a template of something else than such chats: plain text goes on without it
            return None
        places = {i: behind.find(self.token(i)) for i in self.stop_ids}
        return min((i for i in places if places[i] >= 0), key=places.get, default=None)

    def _begin(self) -> tuple[int, ...]:
        plain = self._tokenizer.encode("plain text", add_special_tokens=True)
        marked = zip(plain.ids, plain.special_tokens_mask, strict=True)
        return tuple(i for i, _ in itertools.takewhile(lambda one: one[1], marked))


def _backend(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[Any, bytes]:
    """The tokenizer of the library, and the file that it was made from."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"the tokenizer of {folder} needs tokenizers ({error}): {template.INSTALL}.") from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: this folder has no tokenizer that can be read. Save it with "
                         "`transformers` (AutoTokenizer.from_pretrained(...).save_pretrained(...)), or give the path "
                         "of a SentencePiece .model file.")
    vocabulary = file.read_bytes()
    try:
        made = tokenizers.Tokenizer.from_str(vocabulary.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer of the tokenizers library: {error}.") from error
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add(made, folder, config.get("added_tokens_decoder", {}))
    return made, vocabulary


def _add(made: Any, folder: pathlib.Path, added: Mapping[str, Any]) -> None:
    """Adds the tokens that the configuration describes otherwise than tokenizer.json, or alone."""
    import tokenizers

    there = made.get_added_tokens_decoder()
    try:
        wanted = {int(i): tokenizers.AddedToken(**fields) for i, fields in added.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: added_tokens_decoder in tokenizer_config.json must map ids to tokens: "
                         f"{error}.") from error
    made.add_tokens([wanted[i] for i in sorted(wanted) if wanted[i] != there.get(i)])
    for i, token in wanted.items():
        if made.token_to_id(token.content) != i:
            raise ValueError(f"{folder}: added_tokens_decoder in tokenizer_config.json gives {token.content!r} the id "
                             f"{i}, and tokenizer.json {made.token_to_id(token.content)}.")


def _config(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json; older checkpoints keep the special tokens in a file of their own, which then counts."""
    config = _read(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | _read(folder / "special_tokens_map.json")


def _special_tokens(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The text of the tokens that have a name ("eos_token", ...)."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
        elif name in ("bos_token", "eos_token", "pad_token") and value is not None:
            raise ValueError(f"{folder}: {name} in tokenizer_config.json or special_tokens_map.json is {value!r}: "
                             "expected the token's text.")
    return found


def _template_source(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        if "default" not in named:
            raise ValueError(f"{folder}: chat_template in tokenizer_config.json has templates named {list(named)} and "
                             "none named 'default'.")
        source = named["default"]
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template in tokenizer_config.json is a {type(source).__name__}: expected "
                         "text, or a list of {\"name\", \"template\"}.")
    return source


def _read(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file."""
    return hub.read_json(file) if file.is_file() else {}
