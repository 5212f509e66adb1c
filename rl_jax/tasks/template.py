"""Chat templates as published checkpoints carry them: Jinja sources that turn messages into text."""
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

INSTALL = "pip install rl_jax[hf]"

Message = Mapping[str, Any]


class Template:
    """A chat template, run in a sandbox as it comes from whoever published the checkpoint."""

    def __init__(self, source: str, variables: Mapping[str, str], where: str):
        """Compiles it.

        Args:
          source: the Jinja text.
          variables: what it can name beside the messages: the special tokens ("bos_token", ...).
          where: the file it is from, for errors.
        """
        environment, self._errors = _environment()
        self.source, self._variables, self._where = source, dict(variables), where
        try:
            self._compiled = environment.from_string(source)
        except self._errors as error:
            raise ValueError(f"{where} is no Jinja template: {error}.") from error

    def __reduce__(self):
        return Template, (self.source, self._variables, self._where)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a chat; a template that states the date states today's.

        Args:
          messages: mappings with "role" and "content" and whatever else the template reads
            ("reasoning_content", "tool_calls"); a value of None counts as missing.
          tools: JSON schemas of the functions that may be called.
          add_generation_prompt: whether the header of an assistant turn follows, to be answered.
          variables: further ones that the template reads, such as enable_thinking.

        Raises:
          ValueError: what the template refuses, in its own words.
        """
        if not messages:
            raise ValueError("a chat needs at least one message.")
        present = [{name: value for name, value in message.items() if value is not None} for message in messages]
        given = {"documents": None, **self._variables, **variables}
        try:
            return self._compiled.render(messages=present, tools=None if tools is None else list(tools),
                                         add_generation_prompt=add_generation_prompt, **given)
        except (*self._errors, TypeError) as error:
            roles = [message.get("role") for message in present]
            raise ValueError(f"{self._where} cannot render messages of the roles {roles}: {error}.") from error


def _environment() -> tuple[Any, tuple[type[Exception], ...]]:
    """What templates are written for, the settings and names of `transformers`; and the errors of Jinja."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise ImportError(f"chat templates need jinja2 ({error}): {INSTALL}.") from error

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what an assistant wrote; it renders what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment, (jinja2.TemplateError,)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
