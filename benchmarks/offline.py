"""What soak.py asks, and what a bundle says to it offline, greedily, through the public API.

Arguments: bundle, tokens of a prompt and its answer at most, answers decoded at once. Where there
is no bundle, one is made: random experts and a random router on the embedded base.
"""

import random
import sys
import tempfile
from pathlib import Path

import jax
from common import report
from inputs import config, experiment
from load import Answer, Question
from ours import drawn

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.lora import Routed
from safemoe_jax.weights.base import fetch_base
from safemoe_jax.weights.bundle import read_bundle, write_bundle

QUESTIONS, SHORTEST, LONGEST = 96, 8, 64  # how many; tokens of an answer
WORDS = ("river", "stone", "letter", "garden", "winter", "engine", "market", "window", "bread")


def draw_bundle(directory: Path) -> None:
    of = config()
    with tempfile.TemporaryDirectory() as workdir:
        run = experiment(of, workdir)
        trees = drawn(run.model, "experts", "router")
        write_bundle(directory, base=run.base, config=of, provenance={}, **trees)


def draw_questions(chat: ChatFormat, room: int) -> list[tuple[Question, list[int]]]:
    """Questions and their prompts' ids, at most `room`; as many of each order of magnitude."""
    draw, pairs = random.Random(0), []
    least = len(chat.prompt_ids([{"role": "user", "content": "0:"}]))
    for index in range(QUESTIONS):
        wanted, text = least * (room / least) ** draw.random(), f"{index}:"
        prompt: list[int] = []
        while len(prompt) < wanted:
            longer = f"{text} {draw.choice(WORDS)}"
            ids = chat.prompt_ids([{"role": "user", "content": longer}])
            if prompt and len(ids) > room:
                break
            text, prompt = longer, ids
        pairs.append((Question(text, draw.randint(SHORTEST, LONGEST)), prompt))
    return pairs


def main(directory: Path, length: int, batch_size: int) -> None:
    if not directory.exists():
        draw_bundle(directory)
    bundle = read_bundle(directory, None)
    loaded = on_devices(directory, bundle)
    chat = ChatFormat(loaded.base.tokenizer)
    pairs = draw_questions(chat, min(length, bundle.spec.max_positions) - LONGEST)
    sampler = Sampler(loaded.model, loaded.variables, Routed(), chat.ends)
    with jax.set_mesh(loaded.mesh):
        said = sampler.generate(
            [prompt for _, prompt in pairs],
            max_new_tokens=LONGEST,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            batch_size=batch_size,
        )
    questions, answers = [question for question, _ in pairs], []
    for question, one in zip(questions, said, strict=True):
        # What is greedy does not depend on where it is cut.
        tokens = one.tokens[: question.max_tokens]
        ended = one.finished and len(one.tokens) < question.max_tokens
        answers.append(Answer(chat.text(tokens), "stop" if ended else "length", len(tokens)))
    base, dtype = str(fetch_base(bundle.base.source)), bundle.config.model.compute_dtype
    report({"questions": questions, "answers": answers, "base": base, "dtype": dtype})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
