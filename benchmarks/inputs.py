"""The same work for both sides: the embedded base and tokens of its real corpora, as one file.

The file (npz) holds ragged conversations, one after the other: `tokens`, `offsets` (where each
begins), `starts` (where the answer begins within each) and `streams` (its domain's index).
"""

import runpy
import tempfile
from pathlib import Path

import numpy as np

from safemoe_jax.config import Config, freeze
from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.pipeline import Batch, empty_tokens, write_segment
from safemoe_jax.experiment import Experiment
from safemoe_jax.weights.base import fetch_base
from safemoe_jax.workdir import Workdir

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def base_file() -> Path:
    """The GGUF file of the embedded base, which every peer loads through transformers."""
    return fetch_base("smollm2-135m-instruct")


def config(**changes: object) -> Config:
    """The real run's configuration, keys such as `experts.rank` changed.

    Keyword names have "__" where a key has a dot.
    """
    values = runpy.run_path(str(EXPERIMENTS / "pyrit.py"))["get_config"]()
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return freeze(values)


def experiment(of: Config, directory: str | Path) -> Experiment:
    """An experiment whose files live in a directory that the caller throws away."""
    return Experiment(of, Workdir(Path(directory), of))


def write_corpus(path: Path, *, per_domain: int, safe: bool = False) -> None:
    """Writes `per_domain` training conversations of each domain, or as many safe ones in all."""
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(config(), directory)
        examples = run.safe_informative("train") if safe else run.unsafe("train")
        domains = run.config.data.domains
        items, streams = [], []
        for index, domain in enumerate(domains):
            mine = [example for example in examples if example.domain == domain][:per_domain]
            encoded = run.chat.encode_all([(e.messages, e.response) for e in mine])
            items += [item.cut_to(run.config.data.sequence_length) for item in encoded]
            streams += [index] * len(mine)
    np.savez(
        path,
        tokens=np.concatenate([item.tokens for item in items]),
        offsets=np.cumsum([0, *(len(item.tokens) for item in items)]),
        starts=[item.response_start for item in items],
        streams=streams,
    )


def read_corpus(path: Path) -> tuple[list[Encoded], list[int]]:
    """The conversations of a file and their domains' indices."""
    with np.load(path) as file:
        ends = zip(file["offsets"][:-1], file["offsets"][1:], file["starts"], strict=True)
        items = [Encoded(file["tokens"][a:b], int(start)) for a, b, start in ends]
        return items, file["streams"].tolist()


def full_rows(items: list[Encoded], rows: int, length: int, *, all_tokens: bool) -> Batch:
    """Rows without padding: the conversations one after the other, cut to [rows, length].

    Args:
      items: conversations with at least rows * length tokens in all.
      rows: B.
      length: T.
      all_tokens: let every token carry loss, as a plain language model's training does.
    """
    tokens = np.concatenate([item.tokens for item in items])[: rows * length]
    answer = np.concatenate([np.arange(len(i.tokens)) >= i.response_start for i in items])
    batch = empty_tokens((rows, length))
    for index, (row, carries) in enumerate(
        zip(
            tokens.reshape(rows, length), answer[: rows * length].reshape(rows, length), strict=True
        )
    ):
        write_segment({k: v[index] for k, v in batch.items()}, 0, 1, row, 1)
        if not all_tokens:
            batch["loss_mask_BT"][index, :-1] = carries[1:]
    return {**batch, "expert_ids_B": np.zeros(rows, np.int32)}


def random_rows(rows: int, length: int, *, start: int, vocab_size: int, experts: int) -> Batch:
    """Rows of one conversation of random tokens each, without padding, as training has them.

    Args:
      rows: B; they belong to the experts in turn.
      length: T.
      start: where the answer begins, whose tokens carry loss.
      vocab_size: tokens are below it.
      experts: how many there are.
    """
    batch = empty_tokens((rows, length))
    tokens_BT = np.random.default_rng(0).integers(vocab_size, size=(rows, length))
    for index, tokens in enumerate(tokens_BT):
        write_segment({k: v[index] for k, v in batch.items()}, 0, 1, tokens, start)
    return {**batch, "expert_ids_B": np.arange(rows, dtype=np.int32) % experts}
