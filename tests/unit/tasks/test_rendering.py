"""Messages to tokens: the past is never made of text again."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_tokenizer import CHATML, END, SPECIAL, assets
from transformers import AutoTokenizer

from longshore.errors import ConfigError
from longshore.tasks.rendering import Renderer
from longshore.types import Message

USER = Message("user", "3+4=")
CHAT = [Message("system", "Be short."), USER]


def all_text(renderer: Renderer, ids: list[int]) -> str:
    return str(renderer._tokenizer.decode(ids, skip_special_tokens=False))


def test_a_prompt_ends_where_the_reply_begins() -> None:
    renderer = Renderer(assets())
    ids = renderer.prompt_ids(CHAT)
    assert all_text(renderer, ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n3+4=<|im_end|>\n<|im_start|>assistant\n"
    )
    ids.append(99)
    assert renderer.prompt_ids(CHAT) != ids, "the cache must not hand out its own list"


def test_the_same_tokens_as_transformers(tmp_path: object) -> None:
    tags = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
    )
    tags += "{% else %}{{ bos_token }}{{ m | tojson }}{% endif %}\n"
    tags += "{% if loop.index > 8 %}{% break %}{% endif %}{% endfor %}"
    for template in (CHATML, tags, "  {% if true %}\n    {{ messages[0]['content'] }}\n  {% endif %}\n"):
        files = assets(template, bos_token="<|pad|>")
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)  # type: ignore[operator]
        theirs = AutoTokenizer.from_pretrained(str(tmp_path))
        conversation = [*CHAT, Message("assistant", "<think>x</think> 7 "), Message("user", 'And "5"?')]
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert Renderer(files).prompt_ids(conversation) == expected


@pytest.mark.parametrize(
    ("last_token", "text"),
    [
        # A reply that ended with the template's own end is not ended twice; one that was cut off is.
        (END, "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"),
        (40, "<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_turn_adds_what_is_new_alone(last_token: int, text: str) -> None:
    renderer = Renderer(assets())
    before = [*CHAT, Message("assistant", "<think>long thoughts</think>5")]
    ids = renderer.turn_ids(before, [Message("user", "higher")], last_token)
    assert all_text(renderer, ids) == text


def test_turns_continue_the_prompt_exactly() -> None:
    renderer = Renderer(assets())
    reply, new = Message("assistant", "5"), Message("user", "higher")
    replied = [*renderer.prompt_ids(CHAT), *renderer.reply_ids(reply.content)]
    continued = [*replied, *renderer.turn_ids([*CHAT, reply], [new], END)]
    assert continued == renderer.prompt_ids([*CHAT, reply, new])


def test_a_reply_as_text() -> None:
    renderer = Renderer(assets())
    ids = renderer.reply_ids("7 apples")
    assert ids[-1] == END
    assert renderer.text(ids) == "7 apples"
    assert renderer.vocab_size == len(SPECIAL) + 96


def test_stop_tokens_come_from_both_files() -> None:
    files = assets() | {"generation_config.json": b'{"eos_token_id": [2, 0]}'}
    assert Renderer(assets()).stop_token_ids == (2,)
    assert Renderer(files).stop_token_ids == (0, 2)


def test_without_a_template() -> None:
    renderer = Renderer(assets(None))
    assert all_text(renderer, renderer.prompt_ids([USER])) == "3+4="
    for conversation in (CHAT, [Message("system", "x")]):
        with pytest.raises(ConfigError, match="no chat template"):
            renderer.prompt_ids(conversation)
    before = [USER, Message("assistant", "5")]
    assert all_text(renderer, renderer.turn_ids(before, [Message("user", "higher:")], 40)) == "higher:"


def test_the_template_file_goes_before_the_config() -> None:
    files = assets() | {"chat_template.jinja": b"{{ messages[0].content }}!"}
    assert all_text(Renderer(files), Renderer(files).prompt_ids([USER])) == "3+4=!"
    listed = assets(None, chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}])
    assert all_text(Renderer(listed), Renderer(listed).prompt_ids([USER])) == "y"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system please') }}", "no system please"),
        ("{% for", "malformed"),
        # The sandbox: a template is text that came with somebody's weights.
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 + 'x' }}", "refuses"),
    ],
)
def test_a_bad_template_is_a_clear_error(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Renderer(assets(template)).prompt_ids([USER])


def test_bad_assets() -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Renderer({})
    with pytest.raises(ConfigError, match=r"tokenizer\.json is malformed"):
        Renderer({"tokenizer.json": b"{}"})
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not JSON"):
        Renderer(assets() | {"tokenizer_config.json": b"{"})


def test_light_parts_import_neither_torch_nor_transformers() -> None:
    modules = "longshore.actor.service, longshore.verifier.service, longshore.verifier.worker, longshore.tasks.check"
    program = (
        f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("template", ["{{ 1 // (messages | length - 1) }}", "{{ '{5}'.format(messages[0].content) }}"])
def test_a_template_that_fails_on_a_conversation_refuses_it(template: str) -> None:
    with pytest.raises(ConfigError, match="refuses the conversation"):
        Renderer(assets(template)).conversation_ids([{"role": "user", "content": "x"}])


def test_conversations_have_tools_and_more_than_role_and_content() -> None:
    template = "{{ tools | tojson }}{% for message in messages %}{{ message.name }}:{{ message.content }}{% endfor %}"
    renderer = Renderer(assets(template))
    assert renderer.takes_tools
    ids = renderer.conversation_ids([{"role": "tool", "name": "add", "content": "3"}], [{"type": "function"}])
    assert renderer.full_text(ids) == '[{"type": "function"}]add:3'
    assert not Renderer(assets()).takes_tools
    assert not Renderer(assets(None)).takes_tools
