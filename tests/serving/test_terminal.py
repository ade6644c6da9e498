"""`safemoe chat`, with a terminal that is a string and a user who is a list."""

import io
import os
import re
import signal

import jax
import pytest
from rich.console import Console

from safemoe_jax import cli
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.inference.engine import Engine
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed
from safemoe_jax.serving import terminal

WIDTH = 60


@pytest.fixture
def talk(bundle_path, monkeypatch):
    """Says lines to `safemoe chat` -> its exit code, and what stays on the screen."""

    def talk(*lines, options=()):
        screen, said = io.StringIO(), iter(lines)
        monkeypatch.setattr(
            terminal,
            "console",
            Console(file=screen, force_terminal=True, width=WIDTH, highlight=False),
        )
        monkeypatch.setattr(terminal.sys.stdin, "isatty", lambda: True, raising=False)

        def user(prompt):
            line = next(said, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", user)
        code = cli.main(["chat", "--bundle", str(bundle_path), "--max-new-tokens", "8", *options])
        return code, screen.getvalue()

    return talk


def offline(loaded, *turns):
    chat = ChatFormat(loaded.base.tokenizer)
    sampler = Sampler(loaded.model, loaded.variables, Routed(), chat.end_of_turn)
    with jax.set_mesh(loaded.mesh):
        (said,) = sampler.generate(
            [chat.prompt_ids(turns)],
            max_new_tokens=8,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            batch_size=1,
        )
    return chat.text(said.tokens), said


def shown(text):
    """As the terminal shows it."""
    lines, rest = terminal._lines(text, WIDTH)
    return "\n".join([*lines, rest])


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_remembers_until_it_begins_anew(talk, loaded):
    first, generation = offline(loaded, user("Cats?"))
    answered = {"role": "assistant", "content": first}
    second, _ = offline(loaded, user("Cats?"), answered, user("And dogs?"))
    alone, _ = offline(loaded, user("And dogs?"))
    assert second != alone
    code, screen = talk("Cats?", "And dogs?", "/new", "And dogs?")
    assert code == 0
    places = [screen.rfind(shown(first)), screen.find(shown(second)), screen.rfind(shown(alone))]
    assert -1 < places[0] < places[1] < places[2]
    mean_E = generation.gates_TLE.mean(axis=(0, 1))
    assert f"gates, mean: cats {mean_E[0]:+.2f}, dogs {mean_E[1]:+.2f}" in screen
    assert "█" in screen  # the bars moved while it spoke


def test_a_system_prompt_and_settings_count(talk, loaded):
    system = {"role": "system", "content": "Bark."}
    text, _ = offline(loaded, system, user("Cats?"))
    assert shown(text) in talk("Cats?", options=("--system", "Bark."))[1]
    drawn = {talk("Cats?", options=("--temperature", "2", "--seed", s))[1] for s in "12"}
    assert len(drawn) == 2


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk, loaded, monkeypatch):
    original, steps = Engine.step, []

    def step(self):
        steps.append(self)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    code, screen = talk("Cats?", "/new", "Cats?")
    assert code == 0
    assert len(re.findall("gates, mean", screen)) == 2
    assert len(steps) < 2 * 9
    assert screen.rfind(shown(offline(loaded, user("Cats?"))[0])) > 0
    assert talk("Cats?", KeyboardInterrupt())[0] == 0


def test_a_full_conversation_is_said_to_be(talk):
    code, screen = talk("cats " * 200, "Cats?")
    assert code == 0
    assert "the conversation is full; /new begins another" in screen
    assert len(re.findall("gates, mean", screen)) == 1


def test_lines_are_cut_and_cannot_steer_the_terminal():
    assert terminal._lines("one two three", 8) == (["one two "], "three")
    assert terminal._lines("a\nbcdefghij", 4) == (["a", "bcde", "fghi"], "j")
    assert terminal._lines("日本語", 4) == (["日本"], "語")
    assert terminal._lines("\x1b[2J\x9b\ta\r", 40) == ([], "\ufffd[2J\ufffd   a\ufffd")


def test_bars_show_what_is_added_and_what_is_subtracted():
    assert [terminal._bar(gate).plain for gate in (0.0, 0.5, -0.3)] == [
        "          │          ",
        "          │█████     ",
        "       ███│          ",
    ]


def test_without_a_terminal_it_says_so(bundle_path, capsys):
    assert cli.main(["chat", "--bundle", str(bundle_path)]) == 2
    assert "chat needs a terminal" in capsys.readouterr().err
