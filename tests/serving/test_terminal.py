"""`safemoe chat`, with a screen that is a string and a user who is a list."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

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
def keyboard(monkeypatch):
    """The end of a terminal at which somebody types; standard input is its other end."""
    typed, read = pty.openpty()
    with open(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield typed
    os.close(typed)


@pytest.fixture
def talk(bundle_path, keyboard, monkeypatch):
    """Says lines to `safemoe chat` -> its exit code, and what stays on the screen."""

    def talk(*lines, options=()):
        screen, said = io.StringIO(), iter(lines)
        monkeypatch.setattr(
            terminal,
            "console",
            Console(file=screen, force_terminal=True, width=WIDTH, highlight=False),
        )

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
    sampler = Sampler(loaded.model, loaded.variables, Routed(), chat.ends)
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


def plain(screen):
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", screen)


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
    means = rf"gates, mean: +cats \{mean_E[0]:+.2f} +dogs \{mean_E[1]:+.2f}"
    assert re.search(means, plain(screen))
    assert "█" in screen  # the bars moved while it spoke
    assert "loading" in screen
    assert "reading the prompt" in screen
    assert plain(screen).count("a new conversation\n") == 1


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
    assert plain(screen).count("stopped\n") == 1
    assert len(steps) < 2 * 9
    assert screen.rfind(shown(offline(loaded, user("Cats?"))[0])) > 0
    assert talk("Cats?", KeyboardInterrupt())[0] == 0


def test_ctrl_c_in_an_answers_last_step_ends_no_conversation(talk, monkeypatch):
    original = Engine.step

    def step(self):
        for request in filter(None, self._running):
            request.over = True  # as at its end of turn, when one more step is under way
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    code, screen = talk("Cats?", "/new")
    assert code == 0
    assert plain(screen).count("a new conversation\n") == 1


def test_an_answer_that_is_cut_off_says_so(talk, loaded):
    assert len(offline(loaded, user("Cats?"))[1].tokens) == 8
    assert plain(talk("Cats?")[1]).count("cut off after 8 tokens\n") == 1


def test_what_does_not_fit_is_not_said(talk):
    code, screen = talk("cats " * 200, "Cats?", "cats " * 200)
    assert code == 0
    told = re.findall(
        r"with that it has (\d+) tokens, of 512 at most; (say less(?:, or begin anew by /new)?)",
        " ".join(plain(screen).split()),
    )
    assert [remedy for _, remedy in told] == ["say less", "say less, or begin anew by /new"]
    assert all(int(tokens) >= 512 for tokens, _ in told)
    assert len(re.findall("gates, mean", screen)) == 1


def test_a_command_is_never_a_question(talk):
    code, screen = talk("/help", "/quit")
    assert code == 0
    assert screen.count("Ctrl-C stops an answer, Ctrl-D ends, /new begins anew") == 3
    assert "gates, mean" not in screen
    assert "gates, mean" in talk("/etc/passwd is what?")[1]


def test_typing_is_unseen_while_an_answer_comes(talk, keyboard, monkeypatch):
    def echoes():
        return bool(termios.tcgetattr(keyboard)[3] & termios.ECHO)

    original, seen = Engine.step, set()

    def step(self):
        seen.add(echoes())
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    assert talk("Cats?")[0] == 0
    assert seen == {False}
    assert echoes()


def test_a_paste_is_one_turn():
    program = "from safemoe_jax.serving.keyboard import edit_lines; edit_lines(); "
    typed, read = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}print([input('> '), input('> ')])"],
        stdin=read,
        stdout=read,
        stderr=read,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(read)
    screen = ""

    def see(pattern):
        nonlocal screen
        while not re.search(pattern, screen):
            assert select.select([typed], [], [], 60)[0], screen
            screen += os.read(typed, 4096).decode()

    see(re.escape("\x1b[?2004h") + ".*> ")  # the terminal is asked to mark what is pasted
    os.write(typed, b"\x1b[200~Cats?\rAnd dogs?\x1b[201~\r")
    see("> (?s:.*)> ")
    os.write(typed, b"Mice?\r")
    see(re.escape(r"['Cats?\nAnd dogs?', 'Mice?']"))
    assert process.wait(60) == 0
    os.close(typed)


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
