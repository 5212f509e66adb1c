import datetime
import json
import pickle
import sys

import pytest

from rl_jax.tasks import template
from tests.tasks import checkpoints

CHATS = [(name, chat) for name in checkpoints.NAMES for chat in checkpoints.golden(name)["chats"]]
USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **variables):
    return template.Template(source, {"bos_token": "<s>"}, "the test's template").render(messages, **variables)


@pytest.mark.parametrize(("name", "chat"), CHATS, ids=lambda one: one["name"] if isinstance(one, dict) else one)
def test_chats_have_the_text_that_transformers_renders(name, chat):
    made = checkpoints.load(name).template
    assert made.render(chat["messages"], **checkpoints.arguments(chat)) == chat["rendered"]


def test_blocks_are_trimmed_and_line_ends_behind_them_dropped():
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n"
    assert render(source) == "hi\nend"


def test_loops_may_be_left_and_generation_blocks_mark_nothing():
    source = ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
              "{{ i }}{% endfor %}{% generation %}{% set a = 'x' %}{{ a }}{% endgeneration %}{{ a is defined }}")
    assert render(source) == "02xFalse"


def test_json_is_not_escaped_for_html():
    tools = [{"é": "<a & 'b'>", "n": [1, None, True]}]
    assert render("{{ tools[0] | tojson }}", tools=tools) == json.dumps(tools[0], ensure_ascii=False)
    indented = json.dumps(tools[0], ensure_ascii=False, indent=2)
    assert render("{{ tools[0] | tojson(indent=2) }}", tools=tools) == indented
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"


def test_special_tokens_and_variables_can_be_named():
    assert render("{{ bos_token }}{{ eos_token }}{{ x is defined }}{{ add_generation_prompt }}") == "<s>FalseFalse"
    assert render("{{ bos_token }}{{ x }}", x=3, bos_token="o") == "o3"


def test_a_value_of_none_is_missing():
    messages = [{"role": "user", "content": "a", "tool_calls": None}]
    assert render("{{ messages[0].tool_calls is defined }}", messages) == "False"


def test_the_date_is_today_s():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.date.today().year), str(datetime.date.today().year - 1)}


def test_a_template_cannot_leave_the_sandbox_or_change_the_messages():
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}"):
        with pytest.raises(ValueError, match="the test's template cannot render messages of the roles"):
            render(source)


@pytest.mark.parametrize(("source", "named"), [
    ("{{ raise_exception('roles must alternate') }}", r"roles \['user'\]: roles must alternate\."),
    ("{{ messages[0].content + 1 }}", "roles.*can only concatenate str"),
    ("{{ messages[0].a.b }}", "has no attribute 'a'")])
def test_what_a_template_refuses_is_said_in_its_words(source, named):
    with pytest.raises(ValueError, match=f"(?s)the test's template cannot render.*{named}"):
        render(source)


def test_no_messages_and_no_template():
    with pytest.raises(ValueError, match="at least one message"):
        render("a", [])
    with pytest.raises(ValueError, match="the test's template is no Jinja template: .*'endif'"):
        render("{% if true %}")


def test_it_can_be_sent_to_a_worker():
    made = template.Template("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<"}, "it")
    made = pickle.loads(pickle.dumps(made))
    assert made.render(USER) == "<hi"


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2.*pip install rl_jax\[hf\]"):
        render("a")
