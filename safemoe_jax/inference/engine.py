"""Continuous batching: requests come and go in slots, and one jitted step decodes all of them.

A prompt is read into a free slot of a batch that goes on decoding; a slot whose answer has ended is
free again. Length, temperature, nucleus and random numbers are each slot's own, and no row looks at
another, so an answer does not depend on what runs beside it.

Shape letters: B slots, R prompts read at once, T prompt tokens, C cache slots of a row, V
vocabulary, L layers, E experts.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.model.cache import CACHE_AXES, Cache, extend
from safemoe_jax.model.lora import Routing, rounded
from safemoe_jax.model.precision import AnyArray
from safemoe_jax.model.transformer import Transformer, forward, logits
from safemoe_jax.parallel.hosts import to_host
from safemoe_jax.parallel.sharding import constrain, whole_rows

_SMALLEST_BUCKET = 64
# A CPU is no faster with more.
_TOKENS_AT_ONCE = {"cpu": 1024, "gpu": 16_384, "tpu": 16_384}


@dataclasses.dataclass(eq=False)
class Request:
    """One answer that is asked for.

    Attributes:
      prompt: token ids that end with the generation prompt.
      ends: tokens that end the answer.
      max_new_tokens: longest answer in tokens.
      temperature: 0 decodes greedily.
      top_p: share of probability that sampling keeps (arXiv 1904.09751).
      seed: of the sampling; of it, 32 bits count.
      index: a sampled answer depends on prompt, seed and index alone.
      over: the answer has ended, or nobody wants it any more: who asked may set it at any time,
        from any thread, and the slot is free at the next step.
      sent: decode steps that were dispatched for it; the engine's own.
    """

    prompt: Sequence[int]
    ends: frozenset[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0
    over: bool = False
    sent: int = 0

    @property
    def room(self) -> int:
        """Tokens that prompt and answer may take together."""
        return len(self.prompt) + self.max_new_tokens


class Event(NamedTuple):
    """What one step did for one request.

    Attributes:
      request: which.
      token: the answer's next token; None where its turn has ended.
      gates_LE: the gates with which that token, or the one that ends the turn, was processed; None
        for the base alone.
      finish: None while the answer goes on, "stop" with its end, "length" with its last token.
    """

    request: Request
    token: int | None
    gates_LE: np.ndarray | None
    finish: str | None


class _Row(flax.struct.PyTreeNode):
    """What sampling needs to know of each slot."""

    seed_B: AnyArray
    index_B: AnyArray
    step_B: AnyArray
    temperature_B: AnyArray
    top_p_B: AnyArray


class _State(flax.struct.PyTreeNode):
    """What lives on the devices between steps."""

    cache: Cache
    logits_BV: jax.Array
    rows: _Row


class _Sent(NamedTuple):
    """A step that was dispatched, and whom its rows were for: (slot, request, whether the last)."""

    tokens_B: jax.Array
    gates_LBE: jax.Array | None
    members: list[tuple[int, Request, bool]]


def bucket(length: int) -> int:
    """The padded length for `length` tokens, so that few shapes are compiled.

    Four lengths from a power of two to the next, where powers alone would do: every padded token
    costs prefill, and every padded slot is read again for each new token.
    """
    step = max(_SMALLEST_BUCKET, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def tokens_at_once(platform: str | None = None) -> int:
    """How many tokens one pass over whole texts should have on a "cpu", "gpu" or "tpu"; where not
    given, on what this process has."""
    platform = platform or jax.default_backend()
    return _TOKENS_AT_ONCE.get(platform, _TOKENS_AT_ONCE["gpu"])  # others' are GPUs, too


def rows_together(length: int, slots: int, platform: str | None = None) -> int:
    """How many prompts of a padded length one pass reads at most, on the mesh that is set.

    No device idles while others read: the mesh cuts the rows evenly. `slots` is such a number, too.
    """
    return min(slots, whole_rows(max(1, tokens_at_once(platform) // length)))


class Engine:
    """Decodes requests in slots. Not thread-safe, but for `Request.over`.

    Work it until it is no longer `busy`, on the mesh of the variables:

        engine.submit(Request(...))
        while engine.busy:
            for event in engine.step(): ...
    """

    def __init__(
        self, model: Transformer, variables: dict[str, Any], routing: Routing, slots: int
    ) -> None:
        """Keeps references, and rounded experts; nothing is compiled yet.

        Args:
          model: the transformer.
          variables: its collections; `experts` and `router` may be absent if routing needs none.
          routing: how experts are mixed in; `None` is the base alone.
          slots: answers decoded at once; the mesh that is set may round it up.
        """
        if routing is not None:
            experts = rounded(variables["experts"], model.compute_dtype)
            variables = {**variables, "experts": experts}
        self._model, self._variables, self._routing = model, variables, routing
        self._slots = whole_rows(slots)
        self._waiting: deque[Request] = deque()
        self._running: list[Request | None] = [None] * self._slots
        self._sent: _Sent | None = None
        self._state: _State | None = None
        self._capacity = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._sent or any(self._running))

    def submit(self, request: Request) -> None:
        """Takes a request into the queue: first come, first served."""
        assert len(request.prompt) and request.max_new_tokens > 0
        assert request.room <= self._model.spec.max_positions
        self._waiting.append(request)

    def step(self) -> list[Event]:
        """Fills free slots, dispatches one decode step, and tells what the step before it did.

        So the devices work while the host reads.
        """
        self._running = [None if r is None or r.over else r for r in self._running]
        self._fill()
        before, self._sent = self._sent, self._dispatch()
        return self._read(before) if before else []

    def together(self, length: int) -> int:
        """How many prompts of a length are read by one pass at most."""
        return rows_together(self._padded(length), self._slots)

    def _fill(self) -> None:
        while (free := [slot for slot, r in enumerate(self._running) if r is None]) and (
            group := self._next(len(free))
        ):
            length, slots = self._padded(len(group[0].prompt)), free[: len(group)]
            for slot, request in zip(slots, group, strict=True):
                self._running[slot] = request
            self._fit()
            # Two shapes a length: one prompt, or as many as are read together at most.
            together = self.together(length)
            if 2 * len(group) > together:
                self._prefill(group, slots, together, length)
            else:
                for request, slot in zip(group, slots, strict=True):
                    self._prefill([request], [slot], 1, length)

    def _next(self, free: int) -> list[Request]:
        """The first of the queue, and those behind it that can be read together with it."""
        group: list[Request] = []
        length = most = 0
        while self._waiting:
            request = self._waiting[0]
            if not request.over:
                padded = self._padded(len(request.prompt))
                if not group:
                    length, most = padded, min(free, self.together(padded))
                elif len(group) == most or padded != length:
                    break
                group.append(request)
            self._waiting.popleft()
        return group

    def _padded(self, length: int) -> int:
        return min(bucket(length), self._model.spec.max_positions)

    def _fit(self) -> None:
        """Gives the cache the length that the running requests need.

        It grows when it must and shrinks when half of it would do: each step reads all of it.
        """
        needed = self._padded(max(request.room for request in self._running if request))
        if self._capacity and self._capacity // 2 < needed <= self._capacity:
            return
        if self._state is None:
            self._state = _empty(self._model, self._slots, needed)
        else:
            cache = _resized(self._state.cache, needed)
            self._state = self._state.replace(cache=cache)
        self._capacity = needed

    def _prefill(
        self, group: Sequence[Request], slots: Sequence[int], rows: int, length: int
    ) -> None:
        tokens_RT = np.zeros((rows, length), np.int32)
        length_R = np.ones(rows, np.int32)  # rows that only fill the shape hold one token
        slot_R = np.full(rows, self._slots, np.int32)  # and go to a slot that does not exist
        slot_R[: len(group)] = slots
        for row, request in enumerate(group):
            tokens_RT[row, : len(request.prompt)] = request.prompt
            length_R[row] = len(request.prompt)

        def each(values, dtype):
            return np.pad(np.array(list(values), dtype), (0, rows - len(group)))

        new = _Row(
            seed_B=each((request.seed % 2**32 for request in group), np.uint32),
            index_B=each((request.index for request in group), np.int32),
            step_B=np.zeros(rows, np.int32),
            temperature_B=each((request.temperature for request in group), np.float32),
            top_p_B=each((request.top_p for request in group), np.float32),
        )
        args = self._model, self._variables, self._routing
        self._state = _put(self._state, slot_R, *_read_prompts(*args, tokens_RT, length_R), new)

    def _dispatch(self) -> _Sent | None:
        members = []
        for slot, request in enumerate(self._running):
            if request:
                request.sent += 1
                last = request.sent == request.max_new_tokens
                members.append((slot, request, last))
                if last:
                    self._running[slot] = None
        if not members:
            return None
        live_B = np.zeros(self._slots, bool)
        live_B[[slot for slot, _, _ in members]] = True
        args = self._model, self._variables, self._routing, self._state
        self._state, tokens_B, gates_LBE = _step(*args, live_B)
        return _Sent(tokens_B, gates_LBE, members)

    def _read(self, sent: _Sent) -> list[Event]:
        tokens_B, gates_LBE = to_host((sent.tokens_B, sent.gates_LBE))
        events = []
        for slot, request, last in sent.members:
            if request.over:
                continue
            token: int | None = int(tokens_B[slot])
            finish = "stop" if token in request.ends else "length" if last else None
            if finish == "stop":
                token = None
            request.over = finish is not None
            gates_LE = None if gates_LBE is None else gates_LBE[:, slot]
            events.append(Event(request, token, gates_LE, finish))
        return events


def prefill(
    model: Transformer, variables: Any, routing: Routing, tokens_BT, length_B, cache: Cache
) -> tuple[Cache, jax.Array]:
    """Reads right-padded prompts into an empty cache -> the cache, next-token logits [B, V]."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    held_BT = positions_BT < length_B[:, None]
    out = forward(
        model, variables, tokens_BT, positions_BT, held_BT.astype(jnp.int32), held_BT, routing
    )
    last_B1D = jnp.take_along_axis(out.hidden_BTD, length_B[:, None, None] - 1, axis=1)
    return extend(cache, out.cache), logits(last_B1D[:, 0], out.head)


def decode_step(
    model: Transformer, variables: Any, routing: Routing, token_B: jax.Array, cache: Cache
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Processes one more token per row -> the cache, logits [B, V], gates [L, B, E] or None."""
    out = forward(
        model,
        variables,
        token_B[:, None],
        cache.length_B[:, None],
        jnp.ones_like(token_B)[:, None],
        jnp.zeros_like(token_B, bool)[:, None],
        routing,
        cache,
    )
    gates_LBE = None if out.gates_LBTE is None else out.gates_LBTE[:, :, 0]
    return extend(cache, out.cache), logits(out.hidden_BTD[:, 0], out.head), gates_LBE


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model: Transformer, slots: int, capacity: int) -> _State:
    none_B = jnp.zeros(slots, jnp.int32)
    cache = model.empty_cache(slots, capacity)
    dtype = jnp.promote_types(model.compute_dtype, jnp.float32)  # as `logits` gives them
    logits_BV = jnp.zeros((slots, model.spec.vocab_size), dtype)
    ones_B = jnp.ones(slots, jnp.float32)
    rows = _Row(none_B.astype(jnp.uint32), none_B, none_B, ones_B, ones_B)
    return _laid_out(cache, logits_BV, rows)


def _laid_out(cache: Cache, logits_BV: jax.Array, rows: _Row) -> _State:
    """A state that lies on the mesh as every other, so that it can be written in place."""
    cache = jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), cache, CACHE_AXES)
    rows = jax.tree.map(lambda leaf: constrain(leaf, None), rows)
    return _State(cache, constrain(logits_BV, "batch", "vocab"), rows)


@functools.partial(jax.jit, static_argnums=1)
def _resized(cache: Cache, capacity: int) -> Cache:
    """The cache with another number of slots a row; what is beyond them is nobody's."""

    def resized(kv_LBKCH):
        more = max(capacity - kv_LBKCH.shape[3], 0)
        padding = [(0, 0)] * 3 + [(0, more), (0, 0)]
        kv_LBKCH = jnp.pad(kv_LBKCH, padding)[:, :, :, :capacity]
        return constrain(kv_LBKCH, *CACHE_AXES.k_LBKCH)

    return cache.replace(k_LBKCH=resized(cache.k_LBKCH), v_LBKCH=resized(cache.v_LBKCH))


@functools.partial(jax.jit, static_argnums=0)
def _read_prompts(model, variables, routing, tokens_RT, length_R) -> tuple[Cache, jax.Array]:
    """Reads right-padded prompts -> a cache of their own, next-token logits [R, V]."""
    tokens_RT = constrain(tokens_RT, "batch", None)
    cache = model.empty_cache(*tokens_RT.shape)
    return prefill(model, variables, routing, tokens_RT, length_R, cache)


# Apart from the reading, which takes long to compile and need not know how long the cache is.
@functools.partial(jax.jit, donate_argnums=0)
def _put(state: _State, slot_R, cache: Cache, logits_RV, rows: _Row) -> _State:
    """Puts what was read into slots; a slot that does not exist takes nothing."""

    def put(old, new, axis=0):
        place = (slice(None),) * axis + (slot_R,)
        if old.ndim == 5:  # keys and values: what was there behind the prompt is not read
            place = (*place, slice(None), slice(new.shape[3]))
        return old.at[place].set(new, mode="drop")

    old = state.cache
    return _laid_out(
        cache=Cache(
            k_LBKCH=put(old.k_LBKCH, cache.k_LBKCH, axis=1),
            v_LBKCH=put(old.v_LBKCH, cache.v_LBKCH, axis=1),
            router_sum_LBS=put(old.router_sum_LBS, cache.router_sum_LBS, axis=1),
            prompt_B=put(old.prompt_B, cache.prompt_B),
            length_B=put(old.length_B, cache.length_B),
        ),
        logits_BV=put(state.logits_BV, logits_RV),
        rows=jax.tree.map(put, state.rows, rows),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    model, variables, routing, state: _State, live_B
) -> tuple[_State, jax.Array, jax.Array | None]:
    """One more token for every slot -> the state, the tokens [B], their gates [L, B, E] or None."""
    token_B = _choose(state.logits_BV, state.rows, live_B)
    cache, logits_BV, gates_LBE = decode_step(model, variables, routing, token_B, state.cache)
    rows = state.rows.replace(step_B=state.rows.step_B + 1)
    if gates_LBE is not None:
        gates_LBE = constrain(gates_LBE, None, None, None)  # every host reads all of them
    return _laid_out(cache, logits_BV, rows), constrain(token_B, None), gates_LBE


def _choose(logits_BV: jax.Array, rows: _Row, live_B: jax.Array) -> jax.Array:
    """Greedy where the temperature is 0, else drawn; what no live slot asks for is not computed."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = rows.temperature_B > 0

    def draw():
        scaled_BV = logits_BV / jnp.where(drawn_B, rows.temperature_B, 1.0)[:, None]
        scaled_BV = jax.lax.cond(
            (live_B & drawn_B & (rows.top_p_B < 1)).any(),
            lambda: _nucleus(scaled_BV, rows.top_p_B),
            lambda: scaled_BV,
        )

        def one(seed, index, step, logits_V):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), step)
            return jax.random.categorical(key, logits_V).astype(jnp.int32)

        token_B = jax.vmap(one)(rows.seed_B, rows.index_B, rows.step_B, scaled_BV)
        return jnp.where(drawn_B, token_B, likeliest_B)

    return jax.lax.cond((live_B & drawn_B).any(), draw, lambda: likeliest_B)


def _nucleus(logits_BV: jax.Array, top_p_B: AnyArray) -> jax.Array:
    """-inf outside the smallest set of tokens whose probability reaches top_p; all of them at 1."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is in the set if what is likelier than it has not reached top_p yet.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    in_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    least_B1 = jnp.min(jnp.where(in_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
