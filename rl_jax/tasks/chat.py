"""Chats as a checkpoint was trained on them: messages to token ids, and which of those the policy chose."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rl_jax.tasks import task
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer
from rl_jax.tasks.template import Message

OWN = ("system", "instruction")  # what a task's `chat` holds beside variables of the template
ANSWER = "\ue000"  # of no chat: where it stands in a text, an answer stood
EARLIER = ({"role": "user", "content": "asked"}, {"role": "assistant", "content": ANSWER})
INSTEAD = ("Keep the ids of each answer as they were drawn and put between them what Chat.continuation gives, or learn "
           "from one answer per chat.")


class Chat:
    """A checkpoint's chat template together with its tokenizer.

    The template writes every special token itself: nothing is put in front of its text or behind.
    """

    def __init__(self, tokenizer: CheckpointTokenizer):
        """Takes the tokenizer's template.

        Raises:
          ValueError: if it has none.
        """
        if tokenizer.template is None:
            raise ValueError("the checkpoint has no chat template (chat_template.jinja, or chat_template in "
                             "tokenizer_config.json): take one that was trained on chats, or ask in plain text.")
        self._tokenizer, self._template = tokenizer, tokenizer.template
        stops = {i: tokenizer.token(i) for i in tokenizer.stop_ids}
        self._stops = tuple(text for i, text in stops.items() if tokenizer.encode(text) == [i])

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a chat; arguments as `Template.render` has them."""
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)

    def ids(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
            add_generation_prompt: bool = False, **variables: Any) -> list[int]:
        """The token ids of that text."""
        return self._tokenizer.encode(self.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables))

    def masked(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
               **variables: Any) -> tuple[list[int], list[bool]]:
        """(ids, mask) of a whole chat; the mask is True where an assistant chose the token.

        Chosen are the words of assistant turns (thinking and tool calls included) and the stop token
        behind them. Each answer is cut into tokens as behind its generation prompt, where it was
        drawn: a line end that begins it never joins that of the header.

        Raises:
          ValueError: if the template renders an assistant turn not behind its generation prompt, or
            otherwise once later turns follow (Qwen3 drops earlier thinking): then no single text holds
            what the policy saw at every turn.
        """
        ids, mask, stop = [], [], ""
        for head, answer in self._turns(messages, tools, variables):
            before = self._tokenizer.encode(stop + head)
            after = self._tokenizer.encode(stop + head + answer)
            if after[: len(before)] == before:
                drawn = after[len(before):]
            else:  # a token would cross the end of the generation prompt
                drawn = self._tokenizer.encode(self._stops[0] + answer)[1:]
            head_ids = before[1:] if stop else before
            ids += [*head_ids, *drawn]
            mask += [False] * len(head_ids) + [True] * len(drawn)
            stop = next((one for one in self._stops if answer.endswith(one)), "")
        return ids, mask

    def continuation(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
                     **variables: Any) -> list[int]:
        """The ids to put behind an answer that was drawn: new messages and the next generation prompt.

        The answer stays the ids that it is, its stop token included; nothing is decoded or encoded
        again. Where the template renders every turn as it was drawn, `ids` of the first messages, the
        answer and the continuation are `ids` of the whole chat.

        Args:
          messages: those behind the answer: tool results, or what the user says next.
          tools: as in the first prompt, for templates that repeat them.

        Raises:
          ValueError: if the template refuses the messages or ends no answer with a stop token.
        """
        text = self.render([*EARLIER, *messages], tools=tools, add_generation_prompt=True, **variables)
        _, _, behind = text.partition(ANSWER)
        end, stop = self._end_of_answer(behind)
        return self._tokenizer.encode(stop + behind[end:])[1:]

    def _turns(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None,
               variables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The text in pieces: (what is given, what an assistant wrote behind it); the last answer may be empty."""
        whole, done = self.render(messages, tools=tools, **variables), 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], tools=tools, add_generation_prompt=True, **variables)
            until = self.render(messages[: i + 1], tools=tools, **variables)
            if not until.startswith(prompt):
                raise ValueError(f"message {i}: the chat template does not render this assistant turn behind its own "
                                 f"generation prompt, which ends in {prompt[-40:]!r}. {INSTEAD}")
            if not whole.startswith(until):
                raise ValueError(f"message {i}: the chat template rewrites this assistant turn once later turns follow "
                                 f"it, as templates do that drop earlier thinking. {INSTEAD}")
            end = len(prompt) + self._end_of_answer(until[len(prompt):])[0]
            yield whole[done: len(prompt)], whole[len(prompt): end]
            done = end
        yield whole[done:], ""

    def _end_of_answer(self, text: str) -> tuple[int, str]:
        """Where the first stop token ends, and which it is."""
        found = [(text.index(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if not found:
            raise ValueError(f"the chat template ends an assistant turn with {text[-40:]!r}, where none of the stop "
                             f"tokens {list(self._stops)} is: name the token that ends turns in eos_token_id of "
                             "generation_config.json.")
        at, _, stop = min(found)
        return at + len(stop), stop


def prompt(tokenizer: task.Tokenizer, question: str, chat: Mapping[str, Any] | None,
           prompt_length: int) -> tuple[list[int], str]:
    """(token ids, text) of a question, either plain or as a chat's user turn with the generation prompt.

    Args:
      question: what is asked.
      chat: None asks in plain text. Otherwise it may have "system", a system
        turn's text; "instruction", a line behind the question that says how to answer; and variables
        of the template, such as enable_thinking.
      prompt_length: S, the most tokens it may have.

    Raises:
      ValueError: if it has more, or the tokenizer has no chat template.
    """
    if chat is None:
        return task.encoded_prompt(tokenizer, question, prompt_length), question
    if not isinstance(tokenizer, CheckpointTokenizer):
        raise ValueError(f"chat={dict(chat)} needs the tokenizer of a published checkpoint, whose template writes the "
                         "chat: set tokenizer to its folder or to \"owner/name\", or chat to None for plain text.")
    wrong = {name: chat[name] for name in OWN if not isinstance(chat.get(name, ""), str)}
    if wrong:
        raise ValueError(f"chat has {wrong}: system and instruction are texts.")
    asked = f"{question}\n{chat['instruction']}" if chat.get("instruction") else question
    messages = [{"role": "user", "content": asked}]
    if chat.get("system"):
        messages.insert(0, {"role": "system", "content": chat["system"]})
    variables = {name: value for name, value in chat.items() if name not in OWN}
    text = Chat(tokenizer).render(messages, add_generation_prompt=True, **variables)
    return task.within(tokenizer.encode(text), text, prompt_length), text
