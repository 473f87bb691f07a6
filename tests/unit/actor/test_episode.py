"""Turns, segments and spans, with a scripted generator and scripted surroundings."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from longshore.actor.episode import AttemptFailed, Reply, Transcript, play
from longshore.errors import Rejected
from longshore.tasks.environment import Observation
from longshore.tasks.rendering import Renderer
from longshore.types import EngineFingerprint, FinishReason, GivenSpan, KvMark, Message, SampledSpan, Sampling, Task

END = 0
LETTERS = {"<end>": END} | {character: index for index, character in enumerate(" abcdefghijklmnopqrstuvwxyz?!", 1)}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<end>{% else %}{{ m.content }}?{% endif %}"
    "{% endfor %}"
)
ENGINE = EngineFingerprint("scripted", "1", "float32", "")
SAMPLING = Sampling(1.0, 8, (END,))
TASK = Task("t", (Message("user", "ab"),), answer="cd")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    core = Tokenizer(models.WordLevel(LETTERS, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<end>"])
    config = json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}).encode()
    return Renderer({"tokenizer.json": core.to_str().encode(), "tokenizer_config.json": config})


def ids(text: str) -> list[int]:
    return [LETTERS[character] for character in text]


def reply(
    text: str, *versions: int, finish: FinishReason = FinishReason.STOP, engine: EngineFingerprint = ENGINE
) -> Reply:
    """A reply that ends with END when it stopped; one span for each run of equal versions."""
    tokens = ids(text) + ([END] if finish is FinishReason.STOP else [])
    numbers = list(versions) or [0] * len(tokens)
    spans: list[SampledSpan] = []
    for place, version in enumerate(numbers):
        logprob = -0.5 - place
        if spans and spans[-1].version == version:
            spans[-1] = SampledSpan(version, (*spans[-1].logprobs, logprob))
        else:
            spans.append(SampledSpan(version, (logprob,)))
    return Reply(tokens, spans, finish, (engine,))


class Script:
    """Answers each turn with the next reply, and remembers what it was asked."""

    def __init__(self, *replies: Reply | Exception) -> None:
        self._replies = list(replies)
        self.asked: list[list[int]] = []

    async def __call__(self, token_ids: list[int], sampling: Sampling, turn: int) -> Reply:
        assert sampling == SAMPLING
        assert turn == len(self.asked)
        self.asked.append(list(token_ids))
        answer = self._replies.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """Says `words` one a turn, then is done."""

    def __init__(self, *words: str, info: Callable[[str], dict[str, object]] = lambda reply: {"heard": reply}) -> None:
        self._words = list(words)
        self._info = info

    async def start(self, task: Task) -> list[Message]:
        return list(task.messages)

    async def step(self, reply: str) -> Observation:
        if not self._words:
            return Observation([], done=True, info=self._info(reply))
        return Observation([Message("user", self._words.pop(0))], done=False, info=self._info(reply))


async def run(renderer: Renderer, script: Script, world: World, max_turns: int, task: Task = TASK) -> Transcript:
    return await play(task, SAMPLING, max_turns, renderer, world, script)


async def test_one_turn(renderer: Renderer) -> None:
    script = Script(reply("cd"))
    made = await run(renderer, script, World(info=lambda _: {}), 1)
    assert script.asked == [ids("ab?")]
    assert made.segment.token_ids == (*ids("ab?cd"), END)
    assert made.segment.spans == (GivenSpan(3), SampledSpan(0, (-0.5, -1.5, -2.5)))
    assert [(turn.start, turn.length, turn.finish) for turn in made.turns] == [(3, 3, FinishReason.STOP)]
    assert made.finish is FinishReason.STOP
    request = made.score_request(TASK)
    assert (request.reply, request.turn_info) == ("cd", [])
    assert request.conversation == [Message("user", "ab"), Message("assistant", "cd")]


async def test_weights_that_change_mid_reply_make_several_spans(renderer: Renderer) -> None:
    made = await run(renderer, Script(reply("cd", 4, 4, 5)), World(), 1)
    assert made.segment.spans == (GivenSpan(3), SampledSpan(4, (-0.5, -1.5)), SampledSpan(5, (-2.5,)))


async def test_turns_grow_one_segment_and_never_re_tokenise_the_past(renderer: Renderer) -> None:
    # The second reply was cut off: the template's end of a reply is then given, not sampled.
    script = Script(reply("x"), reply("y", finish=FinishReason.LENGTH), reply("z"))
    made = await run(renderer, script, World("up", "down"), 5)
    first = [*ids("ab?x"), END]
    second = [*first, *ids("up?"), *ids("y")]
    third = [*second, END, *ids("down?")]
    assert script.asked == [ids("ab?"), [*first, *ids("up?")], third]
    assert list(made.segment.token_ids) == [*third, *ids("z"), END]
    assert [span.length for span in made.segment.spans] == [3, 2, 3, 1, 6, 2]
    for turn, text in zip(made.turns, ("x", "y", "z"), strict=True):
        tokens = list(made.segment.token_ids[turn.start : turn.start + turn.length])
        assert renderer.text(tokens) == text
        assert turn.info == {"heard": text}
    assert made.finish is FinishReason.ENVIRONMENT
    assert made.score_request(TASK).turn_info == [{"heard": "x"}, {"heard": "y"}, {"heard": "z"}]


async def test_the_last_turn_ends_it(renderer: Renderer) -> None:
    made = await run(renderer, Script(reply("x"), reply("y")), World("up", "up", "up"), 2)
    assert made.finish is FinishReason.TURNS
    assert len(made.turns) == 2
    # What the environment said last was never read by the model, so it is no part of the tokens.
    assert made.segment.token_ids[-2:] == (LETTERS["y"], END)
    assert made.conversation[-1] == Message("user", "up")
    assert made.score_request(TASK).reply == "y"


async def test_a_conversation_that_outgrows_the_context_is_scored_as_it_is(renderer: Renderer) -> None:
    made = await run(renderer, Script(reply("x"), Rejected("prompt", "too long")), World("up", "up"), 5)
    assert made.finish is FinishReason.LENGTH
    assert list(made.segment.token_ids) == [*ids("ab?x"), END]
    assert isinstance(made.segment.spans[-1], SampledSpan)


@pytest.mark.parametrize("turn", [0, 1])
async def test_other_rejections_pass_through(renderer: Renderer, turn: int) -> None:
    replies = [reply("x")] * turn
    with pytest.raises(Rejected, match="version"):
        await run(renderer, Script(*replies, Rejected("version", "gone")), World("up", "up"), 5)
    with pytest.raises(Rejected, match="too long"):
        await run(renderer, Script(Rejected("prompt", "too long")), World(), 5)


async def test_a_prompt_without_tokens_is_rejected(renderer: Renderer) -> None:
    bare = Renderer({"tokenizer.json": renderer._tokenizer.to_str().encode()})
    for task, reason in ((Task("t", (Message("user", ""),)), "no tokens"), (Task("t", TASK.messages * 2), "template")):
        with pytest.raises(Rejected, match=f"prompt: .*{reason}"):
            await run(bare, Script(), World(), 1, task)


@pytest.mark.parametrize(
    "broken",
    [
        Reply([], [], FinishReason.STOP, (ENGINE,)),
        Reply([1, 2], [SampledSpan(0, (-0.5,))], FinishReason.STOP, (ENGINE,)),
    ],
)
async def test_a_reply_that_does_not_add_up_is_not_used(renderer: Renderer, broken: Reply) -> None:
    with pytest.raises(AttemptFailed, match="generator_failed"):
        await run(renderer, Script(broken), World(), 1)


async def test_engines_are_listed_once(renderer: Renderer) -> None:
    other = EngineFingerprint("scripted", "2", "bfloat16", "")
    script = Script(reply("x"), reply("y", engine=other), reply("z"))
    made = await run(renderer, script, World("up", "up"), 5)
    assert made.engines == [ENGINE, other]
    sampled = [span for span in made.spans if isinstance(span, SampledSpan)]
    assert [span.engine_index for span in sampled] == [0, 1, 0]
    assert all(span.kv is KvMark.RECOMPUTED for span in sampled)


@pytest.mark.parametrize("info", [{"x": object()}, {"x": float("nan")}, {"x": "y" * 70_000}])
async def test_info_that_cannot_travel_is_rejected(renderer: Renderer, info: dict[str, object]) -> None:
    with pytest.raises(Rejected, match="environment: the environment's info"):
        await run(renderer, Script(reply("x")), World(info=lambda _: info), 1)
