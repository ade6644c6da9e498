"""A bundle under lm-eval, EleutherAI's harness: `lm_eval --model safemoe --model_args bundle=DIR`.

The entry point `lm_eval.models` of this package names `SafeMoELM`. lm-eval reads entry points from
the release after 0.4.13 on; until then this module is the command:

    python -m safemoe_jax.serving.harness --model safemoe --model_args bundle=DIR --tasks NAME

Texts are encoded and cut as by lm-eval's own model `hf`. What a task calls context is the prompt of
a router that pools over prompts.

Shape letters: B rows, T tokens, C tokens of a continuation.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval.models  # noqa: F401 (its own models are known before ours)
import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from safemoe_jax.data.chat import ChatFormat, said
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_digest
from safemoe_jax.inference.engine import Engine, Request, bucket, tokens_at_once
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.transformer import forward, logits
from safemoe_jax.parallel.hosts import set_up_jax, to_host
from safemoe_jax.parallel.sharding import whole_rows
from safemoe_jax.progress import track
from safemoe_jax.serving.text import TextStream
from safemoe_jax.weights.artefact import MANIFEST
from safemoe_jax.weights.bundle import read_bundle

NAME = "safemoe"
_ROUTINGS = {"router": Routed(), "base": None}
_MAX_NEW_TOKENS = 256  # where a task does not say; as of `hf`
_SLOTS = 16  # where lm-eval is to choose the batch size


class SafeMoELM(TemplateLM):
    """What lm-eval asks of a model; gated by its router, or the base alone for comparison."""

    def __init__(
        self,
        bundle: str,
        routing: str = "router",
        max_length: int | None = None,
        batch_size: int | str = _SLOTS,
        **of_every_model: Any,
    ) -> None:
        """Loads a bundle.

        Args:
          bundle: its directory.
          routing: "router" or "base"; what is ungated cannot be evaluated here.
          max_length: tokens of a text, context included; default and limit: the base's own.
          batch_size: answers generated at once; "auto" takes 16. Log-likelihoods are batched by
            what the machine does well at once.
          of_every_model: device and max_batch_size, which lm-eval gives every model; not used.

        Raises:
          UserError: on a bundle that is refused, or an argument that is unknown or makes no sense.
        """
        super().__init__()
        if unknown := sorted(of_every_model.keys() - {"device", "max_batch_size"}):
            raise UserError(
                f"--model_args has {unknown[0]}, which is unknown; there are bundle, routing, "
                "max_length"
            )
        if routing not in _ROUTINGS:
            raise UserError(f"routing is {routing!r}; choose of {', '.join(_ROUTINGS)}")
        set_up_jax()
        directory = Path(bundle).expanduser()
        self._loaded = on_devices(directory, read_bundle(directory, None))
        longest = self._loaded.model.spec.max_positions
        self.max_length = longest if max_length is None else max_length
        if not 1 < self.max_length <= longest:
            raise UserError(f"max_length is {max_length}; this base reads 2 to {longest} tokens")
        # Any, as to `ChatFormat`: what its methods return depends on their arguments.
        self.tokenizer: Any = self._loaded.base.tokenizer
        self._chat = ChatFormat(self.tokenizer)
        self._routing = _ROUTINGS[routing]
        self._slots = _SLOTS if str(batch_size).startswith("auto") else int(batch_size)
        self._info = {
            "bundle_sha256": file_digest(directory / MANIFEST),
            "base": self._loaded.base.identity.source,
            "base_sha256": self._loaded.base.identity.sha256,
            "routing": routing,
        }

    def get_model_info(self) -> dict[str, str]:
        """What lm-eval writes beside the results: which bundle it was, on which base."""
        return self._info

    @property
    def tokenizer_name(self) -> str:
        return f"{NAME}-{self._info['base_sha256'][:12]}"

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return self._chat.end_of_turn if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer puts before a text, unless it stands there already."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the base's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of continuations: log-likelihood in nats, and whether each token is the likeliest.

        Args:
          requests: (what it is cached by, context, continuation), the latter two token ids. Where
            they are too long, the context loses its left.
        """
        # The last token is predicted and not read.
        texts = [(context + own)[-(self.max_length + 1) :] for _, context, own in requests]
        own_lengths = [len(own) for *_, own in requests]
        if (most := max(own_lengths, default=1)) > self.max_length:
            raise UserError(f"a continuation has {most} tokens; max_length is {self.max_length}")
        found: dict[int, tuple[float, bool]] = {}
        model, variables = self._loaded.model, self._loaded.variables
        with jax.set_mesh(self._loaded.mesh):
            batches = list(_batches([len(text) - 1 for text in texts]))
            for length, rows, members in track(
                batches, total=len(batches), description="log-likelihoods"
            ):
                tokens_BT = np.zeros((rows, length + 1), np.int32)
                length_B, own_B = np.ones(rows, np.int32), np.ones(rows, np.int32)
                for row, index in enumerate(members):
                    tokens_BT[row, : len(texts[index])] = texts[index]
                    length_B[row], own_B[row] = len(texts[index]) - 1, own_lengths[index]
                most = min(bucket(int(own_B.max())), length)
                scores_BC, likeliest_BC = to_host(
                    _scores(model, most, variables, self._routing, tokens_BT, length_B, own_B)
                )
                for row, index in enumerate(members):
                    score = float(scores_BC[row, : own_lengths[index]].sum(dtype=np.float64))
                    likeliest = bool(likeliest_BC[row, : own_lengths[index]].all())
                    found[index] = score, likeliest
                    if (key := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", key, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in nats; long ones in windows that follow one another."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings, which is left out."""
        decode = functools.partial(said, self.tokenizer)
        running: dict[Request, tuple[int, TextStream]] = {}
        for index, instance in enumerate(requests):
            request, stops = self._request(index, *instance.args)
            running[request] = index, TextStream(decode, stops)
        answers = [""] * len(requests)
        with jax.set_mesh(self._loaded.mesh):
            engine = Engine(self._loaded.model, self._loaded.variables, self._routing, self._slots)
            for request in sorted(running, key=lambda request: -len(request.prompt)):
                engine.submit(request)
            for index in track(
                _ended(engine, running, answers), total=len(requests), description="answers"
            ):
                args = requests[index].args
                self.cache_hook.add_partial("generate_until", args, answers[index])
        return answers

    def _request(
        self, index: int, context: str, settings: dict[str, Any]
    ) -> tuple[Request, list[str]]:
        """An answer that is asked for, and its stop strings."""
        given = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        stops, most = given.pop("until"), given.pop("max_gen_toks")
        # The harness gives a greedy task a temperature, too: 0.
        sampled, temperature = given.pop("do_sample"), float(given.pop("temperature", 1.0))
        temperature = temperature if sampled else 0.0
        top_p = float(given.pop("top_p", 1.0))
        if given:
            raise UserError(
                f"the task's generation_kwargs have {', '.join(given)}, which is unknown; there "
                "are until, max_gen_toks, do_sample, temperature, top_p"
            )
        if not 0 < most < self.max_length:
            raise UserError(
                f"the task's max_gen_toks is {most}; with max_length {self.max_length} it must be "
                f"1 to {self.max_length - 1}"
            )
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        request = Request(prompt, self._chat.ends, most, temperature, top_p, seed=0, index=index)
        return request, [stop for stop in stops if stop]


def _ended(
    engine: Engine, running: dict[Request, tuple[int, TextStream]], answers: list[str]
) -> Iterator[int]:
    """Works the engine and writes the answers; gives the index of each that has ended."""
    while engine.busy:
        for event in engine.step():
            index, text = running[event.request]
            if event.token is not None:
                answers[index] += text.add(event.token)
            if event.finish and not text.stopped:
                answers[index] += text.end()
            if event.finish or text.stopped:
                event.request.over = True
                yield index


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Padded length, rows and members of batches, the longest texts first; few shapes come up."""
    left = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while left:
        length = bucket(lengths[left[0]])
        rows = whole_rows(max(1, tokens_at_once() // length))
        yield length, rows, left[:rows]
        left = left[rows:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(model, most: int, variables, routing, tokens_BT, length_B, own_B):
    """Log-probabilities of continuations' tokens, and whether each is the likeliest, [B, C].

    The first `length_B` tokens are read; the last `own_B` of the `length_B` + 1 are continuation.
    C is `most`; what is behind a row's continuation means nothing.
    """
    targets_BT, tokens_BT = tokens_BT[:, 1:], tokens_BT[:, :-1]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    start_B1 = (length_B - own_B)[:, None]
    out = forward(
        model,
        variables,
        tokens_BT,
        positions_BT,
        (positions_BT < length_B[:, None]).astype(jnp.int32),
        positions_BT <= start_B1,  # what stands before the continuation
        routing,
    )
    place_BC = jnp.minimum(start_B1 + jnp.arange(most)[None], tokens_BT.shape[1] - 1)
    hidden_BCD = jnp.take_along_axis(out.hidden_BTD, place_BC[..., None], axis=1)
    targets_BC = jnp.take_along_axis(targets_BT, place_BC, axis=1)

    def row(of_row):  # one after the other: logits of all rows are large
        hidden_CD, targets_C = of_row
        log_p_CV = jax.nn.log_softmax(logits(hidden_CD, out.head))
        own_C = jnp.take_along_axis(log_p_CV, targets_C[:, None], axis=1)[:, 0]
        return own_C, log_p_CV.argmax(axis=-1) == targets_C

    return jax.lax.map(row, (hidden_BCD, targets_BC))


def main() -> None:
    """lm-eval's own command, with this model among its models."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=SafeMoELM)
    try:
        cli_evaluate()
    except UserError as error:
        print(f"safemoe: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
