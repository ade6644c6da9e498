"""From a corpus to batches: leave out what has no tokens, tokenize once, pack by the plan, shuffle
and shard by Grain.

Shape letters: B rows in the batch, T tokens in a row, S segments in a row.

A batch is a dict of numpy arrays:
  tokens_BT        int32    0 at padding
  targets_BT       int32    the next token of the same segment; 0 at segment ends and padding
  loss_mask_BT     float32  1 where targets_BT is a response token of the same segment
  prompt_mask_BT   bool     true where tokens_BT belongs to its segment's prompt
  positions_BT     int32    from 0 in each segment
  segment_ids_BT   int32    from 1; 0 at padding
  expert_ids_B     int32    the row's stream
  example_ids_BS   int32    ids of the examples in the row's segments; -1 where there is none
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from safemoe_jax.data.chat import ChatFormat, Encoded, Unencodable
from safemoe_jax.data.corpora import Corpus, Example
from safemoe_jax.data.packing import PackingPlan, plan
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_digest
from safemoe_jax.private_files import read_json_lines, replace_json_lines
from safemoe_jax.progress import console, track

Batch = dict[str, np.ndarray]

_FORMAT = 3  # raise it when what is stored for the same examples changes
_ENCODED_AT_ONCE = 256
_DIGESTS = "sha256.json"  # of the other files of a packed corpus
_ENDLESS = 2**62
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # counted in batches


class Tokens(NamedTuple):
    """Tokens of a packed corpus: those that carry loss, and all."""

    loss: int
    all: int


@dataclasses.dataclass(frozen=True)
class PackedCorpus:
    """Tokenized, packed examples: random access to rows; the tokens stay on disk.

    Attributes:
      streams: names in order; the stream index is the expert id.
      sequence_length: T.
      flat_tokens: int32, all examples' tokens one after the other, memory-mapped.
      offsets: int64 [examples + 1], where each example's tokens begin.
      response_starts: int32 [examples], where the answer begins within each example.
      example_ids: int32 [examples].
      plan: which examples share a row.
      counts: examples, and how many lost a part of the response or of the prompt to fit a row.
      fingerprint: of the examples, the tokenizer, the row's length and the seed.
    """

    streams: tuple[str, ...]
    sequence_length: int
    flat_tokens: np.ndarray
    offsets: np.ndarray
    response_starts: np.ndarray
    example_ids: np.ndarray
    plan: PackingPlan
    counts: dict[str, int]
    fingerprint: str

    @property
    def num_streams(self) -> int:
        return len(self.streams)

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    @property
    def tokens(self) -> Tokens:
        lengths = np.diff(self.offsets)
        return Tokens(int((lengths - self.response_starts).sum()), int(lengths.sum()))

    def row(self, index: int) -> Batch:
        """Row `index` with the keys of a batch, without the batch axis."""
        row = self.empty_row()
        row["expert_ids_B"] = self.plan.row_streams[index]
        start = 0
        for segment, item in enumerate(self.plan.row(index)):
            tokens = self.flat_tokens[self.offsets[item] : self.offsets[item + 1]]
            row["example_ids_BS"][segment] = self.example_ids[item]
            start = write_segment(row, start, segment + 1, tokens, self.response_starts[item])
        return row

    def empty_row(self) -> Batch:
        """A row of padding."""
        return {
            **empty_tokens((self.sequence_length,)),
            "expert_ids_B": np.array(0, np.int32),
            "example_ids_BS": np.full(self.plan.max_segments, -1, np.int32),
        }


def empty_tokens(shape: tuple[int, ...]) -> Batch:
    """What a batch says of each token, for padding alone; `shape` is (T,) or (B, T)."""
    kinds = {
        "tokens_BT": np.int32,
        "targets_BT": np.int32,
        "loss_mask_BT": np.float32,
        "prompt_mask_BT": bool,
        "positions_BT": np.int32,
        "segment_ids_BT": np.int32,
    }
    return {key: np.zeros(shape, kind) for key, kind in kinds.items()}


def write_segment(
    row: Batch, start: int, segment: int, tokens: np.ndarray, response_start: int
) -> int:
    """Writes one conversation into a row, in place.

    Args:
      row: arrays [T] as `empty_tokens` makes them.
      start: where in the row it begins.
      segment: its segment id, from 1.
      tokens: its tokens.
      response_start: index in `tokens` of the answer's first.

    Returns:
      Where in the row it ends.
    """
    stop, response = start + len(tokens), start + response_start
    row["tokens_BT"][start:stop] = tokens
    row["targets_BT"][start : stop - 1] = tokens[1:]
    row["loss_mask_BT"][response - 1 : stop - 1] = 1.0
    row["prompt_mask_BT"][start:response] = True
    row["positions_BT"][start:stop] = np.arange(len(tokens))
    row["segment_ids_BT"][start:stop] = segment
    return stop


def encodable(corpus: Corpus, chat: ChatFormat, directory: Path) -> Corpus:
    """The corpus without the examples that the base's chat template does not take.

    Some templates know no system turn, or want user and assistant to alternate. Such examples are
    counted as dropped, and written to `directory`/unencodable-HASH.jsonl with id and reason, which
    is also what keeps them from being looked for again.

    Args:
      corpus: as it was loaded.
      chat: how a conversation becomes tokens.
      directory: the data's.

    Raises:
      UserError: where no example of a domain is left.
    """
    tokenizer = chat.tokenizer
    template = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    digest = hashlib.sha256(json.dumps([_FORMAT, template, corpus.fingerprint]).encode())
    path = directory / f"unencodable-{digest.hexdigest()[:16]}.jsonl"
    if not path.exists():
        found = [
            {"id": example.id, "reason": item.reason}
            for example, item in _encoded(corpus.examples, chat, "try the chat template")
            if isinstance(item, Unencodable)
        ]
        replace_json_lines(path, found)
        if found:
            console.print(f"{len(found)} rows left out by the chat template; id and reason: {path}")
    reasons = {row["id"]: row["reason"] for row in read_json_lines(path)}
    kept = tuple(example for example in corpus.examples if example.id not in reasons)
    dropped = collections.Counter(f"rejected: {reason}" for reason in reasons.values())
    left = {example.domain for example in kept}
    if missing := [domain for domain in corpus.domains if domain not in left]:
        raise UserError(
            f"the base's chat template takes no row of {missing[0]!r}; of all rows it leaves out "
            f"{dict(dropped)}; write them in turns that it knows, or take another base"
        )
    counts = {**corpus.counts, "kept": len(kept), "dropped": corpus.counts["dropped"] | dropped}
    return dataclasses.replace(corpus, examples=kept, counts=counts)


def _encoded(
    examples: Sequence[Example], chat: ChatFormat, description: str
) -> Iterator[tuple[Example, Encoded | Unencodable]]:
    blocks = range(0, len(examples), _ENCODED_AT_ONCE)
    for start in track(blocks, total=len(blocks), description=description):
        block = examples[start : start + _ENCODED_AT_ONCE]
        items = chat.encode_each([(example.messages, example.response) for example in block])
        yield from zip(block, items, strict=True)


def pack(
    examples: Sequence[Example],
    chat: ChatFormat,
    sequence_length: int,
    seed: int,
    *,
    streams: Sequence[str] | None,
    directory: Path,
) -> PackedCorpus:
    """Tokenizes and packs `examples`, or reads what an equal earlier call stored.

    An example longer than a row loses its response's end, down to half a row; then its prompt's
    left.

    Args:
      examples: what to pack.
      chat: how a conversation becomes tokens.
      sequence_length: tokens in a row.
      seed: of the packing order.
      streams: the examples' domains, in the order of the experts; None makes one stream of all.
      directory: where the tokens and the plan are kept.

    Raises:
      UserError: where there is no example, or the template does not take one (see `encodable`);
        where what was stored is not as it was written.
    """
    if not examples:
        raise UserError(
            "there is no example to pack; check data.domains, the score thresholds and the split"
        )
    names = ("all",) if streams is None else tuple(streams)
    fingerprint = _fingerprint(examples, chat, sequence_length, seed, streams)
    stored = directory / f"packed-{fingerprint}"
    if not stored.exists():
        _build(stored, examples, chat, sequence_length, seed, streams)
    _check(stored)
    with np.load(stored / "items.npz") as items:
        return PackedCorpus(
            streams=names,
            sequence_length=sequence_length,
            flat_tokens=np.load(stored / "tokens.npy", mmap_mode="r"),
            plan=PackingPlan.load(stored / "plan.npz"),
            counts=json.loads((stored / "counts.json").read_text()),
            fingerprint=fingerprint,
            **items,
        )


def _check(stored: Path) -> None:
    """Refuses what changed on the disk: of tokens nobody else would see it."""
    try:
        for name, sha256 in json.loads((stored / _DIGESTS).read_text()).items():
            if file_digest(stored / name) != sha256:
                raise ValueError(f"{name} was changed")
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise UserError(
            f"{stored} is damaged ({error}); delete it, and the same command makes it again"
        ) from error


def train_iterator(
    packed: PackedCorpus, rows: int, seed: int, places: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Endless batches with `rows` rows of every stream: stream 0's rows, then stream 1's, ...

    Each stream is reshuffled in every epoch of its own. The rows that a stream yields at step n
    depend on the seed, its own name and n alone. The state (`get_state`, `set_state`) is one
    number, the same on every process and for any number of processes.

    Args:
      packed: the corpus.
      rows: rows of each stream in the global batch.
      seed: of the shuffle.
      places: which rows of the batch to yield, those of this process; None for all.

    Raises:
      UserError: where a stream has no row.
    """
    drawn = [_drawn_rows(packed, stream, seed) for stream in range(packed.num_streams)]
    places = range(rows * packed.num_streams) if places is None else places

    def batch(step: int) -> Batch:
        at = (divmod(int(place), rows) for place in places)
        return _stack([packed.row(drawn[stream](step * rows + draw)) for stream, draw in at])

    return iter(grain.MapDataset.range(_ENDLESS).map(batch).to_iter_dataset(_READ_OPTIONS))


def epoch(
    packed: PackedCorpus, batch_size: int, places: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches that hold each row once, in order; rows of padding fill up the last one.

    `places` are the rows of each batch to yield; None for all.
    """
    places = range(batch_size) if places is None else places
    for start in range(0, packed.num_rows, batch_size):
        indices = (start + int(place) for place in places)
        yield _stack(
            [packed.row(i) if i < packed.num_rows else packed.empty_row() for i in indices]
        )


def _stack(rows: Sequence[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _drawn_rows(packed: PackedCorpus, stream: int, seed: int) -> Callable[[int], int]:
    """The n-th row drawn from a stream, as a function of n: reshuffled every epoch, without end.

    An epoch's order is a permutation made when the epoch is entered. Grain's own index shuffle
    keeps no such array, and needs milliseconds an index where a stream has few rows.
    """
    name = packed.streams[stream]
    rows = packed.plan.rows_of(stream)
    if not len(rows):
        raise UserError(
            f"there is no training row of {name!r}; add examples of it or take it out of "
            "data.domains"
        )
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    stream_seed = int.from_bytes(digest[:8], "little")

    @functools.lru_cache(maxsize=2)  # reader threads straddle the end of an epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([stream_seed, epoch]).permutation(rows)

    def drawn(n: int) -> int:
        epoch, place = divmod(n, len(rows))
        return int(order(epoch)[place])

    return drawn


def _fingerprint(
    examples: Sequence[Example],
    chat: ChatFormat,
    sequence_length: int,
    seed: int,
    streams: Sequence[str] | None,
) -> str:
    digest = hashlib.sha256(chat.tokenizer.backend_tokenizer.to_str().encode())
    settings = (_FORMAT, chat.tokenizer.chat_template, sequence_length, seed, streams)
    digest.update(json.dumps(settings).encode())
    for example in examples:
        fields = (example.id, example.domain, example.messages, example.response)
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def _build(
    stored: Path,
    examples: Sequence[Example],
    chat: ChatFormat,
    sequence_length: int,
    seed: int,
    streams: Sequence[str] | None,
) -> None:
    """Tokenizes, plans and stores; the directory appears only when it is whole."""
    encoded: list[Encoded] = []
    counts = {"examples": len(examples), "responses_cut": 0, "prompts_cut": 0}
    for _, item in _encoded(examples, chat, "tokenize"):
        if isinstance(item, Unencodable):
            raise item
        cut = item.cut_to(sequence_length)
        counts["responses_cut"] += item.response_tokens > cut.response_tokens
        counts["prompts_cut"] += item.response_start > cut.response_start
        encoded.append(cut)

    lengths = np.array([len(item.tokens) for item in encoded])
    stream_ids = [0 if streams is None else streams.index(e.domain) for e in examples]
    stored.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=stored.parent, prefix="packing-"))
    try:
        np.save(partial / "tokens.npy", np.concatenate([item.tokens for item in encoded]))
        np.savez(
            partial / "items.npz",
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            response_starts=np.array([item.response_start for item in encoded], np.int32),
            example_ids=np.array([e.id for e in examples], np.int32),
        )
        plan(lengths, np.array(stream_ids, np.int64), sequence_length, seed).save(
            partial / "plan.npz"
        )
        (partial / "counts.json").write_text(json.dumps(counts))
        digests = {file.name: file_digest(file) for file in partial.iterdir()}
        (partial / _DIGESTS).write_text(json.dumps(digests))
        os.replace(partial, stored)
    except OSError:
        if not stored.exists():  # else another process has stored the same meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
