"""A bundle under lm-eval: `lm_eval --model safemoe --model_args bundle=DIR`.

lm-eval (EleutherAI's lm-evaluation-harness) finds `SafeMoELM` by the entry point of this package.
Texts are encoded and cut as by its own model `hf`.

Shape letters: B rows, T tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.errors import UserError
from safemoe_jax.generate import on_devices
from safemoe_jax.inference.engine import Engine, Request, bucket, tokens_at_once
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.transformer import logits
from safemoe_jax.parallel.hosts import to_host
from safemoe_jax.parallel.sharding import whole_rows
from safemoe_jax.progress import track
from safemoe_jax.serving.text import TextStream
from safemoe_jax.weights.bundle import read_bundle

_MAX_LENGTH = 2048
_MAX_NEW_TOKENS = 256  # as of `hf`
_ROUTINGS = {"router": Routed(), "base": None}


class SafeMoELM(TemplateLM):
    """What lm-eval asks of a model; gated, or the base alone for comparison."""

    def __init__(
        self,
        bundle: str,
        routing: str = "router",
        batch_size: int | str = 16,
        max_length: int = _MAX_LENGTH,
        **given: Any,
    ) -> None:
        """Loads a bundle.

        Args:
          bundle: its directory.
          routing: "router", or "base"; what is ungated cannot be evaluated here.
          batch_size: answers generated at once; lm-eval's default "1" included.
          max_length: tokens of a text, at most the base's.
          given: what lm-eval gives every model: device, max_batch_size.

        Raises:
          UserError: on a bundle that is refused, or an argument that is unknown.
        """
        super().__init__()
        if unknown := given.keys() - {"device", "max_batch_size"}:
            raise UserError(
                f"unknown model argument {min(unknown)}; there are bundle, routing, max_length"
            )
        if routing not in _ROUTINGS:
            raise UserError(f"routing is {routing!r}; choose of {', '.join(_ROUTINGS)}")
        directory = Path(bundle).expanduser()
        self._loaded = on_devices(directory, read_bundle(directory, None))
        self._routing = _ROUTINGS[routing]
        self.tokenizer = self._loaded.base.tokenizer
        self._chat = ChatFormat(self.tokenizer)
        self.max_length = min(max_length, self._loaded.model.spec.max_positions)
        self._slots = int(batch_size) if str(batch_size).isdigit() else 16
        self._name = directory.resolve().as_posix()

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return self._chat.end_of_turn if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids with what the tokenizer puts before a text, but never twice."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of continuations: their log-likelihood, in nats, and whether each token is the likeliest.

        Args:
          requests: (what it is cached by, context, continuation), the latter two token ids. Where
            they are too long, the context loses its left.
        """
        # The last token is predicted and not read.
        texts = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        found: dict[int, tuple[float, bool]] = {}
        batches = list(_batches([len(text) - 1 for text in texts]))
        with jax.set_mesh(self._loaded.mesh):
            for length, rows, indices in track(
                batches, total=len(batches), description="log-likelihoods"
            ):
                tokens_BT = np.zeros((rows, length + 1), np.int32)
                length_B, prompt_B = np.ones(rows, np.int32), np.ones(rows, np.int32)
                for row, index in enumerate(indices):
                    tokens_BT[row, : len(texts[index])] = texts[index]
                    length_B[row] = len(texts[index]) - 1
                    prompt_B[row] = len(texts[index]) - len(requests[index][2])
                model, variables = self._loaded.model, self._loaded.variables
                args = model, variables, self._routing, tokens_BT, length_B, prompt_B
                scores_BT, likeliest_BT = to_host(_scores(*args))
                for row, index in enumerate(indices):
                    answer = slice(prompt_B[row] - 1, length_B[row])
                    total = scores_BT[row, answer].sum(dtype=np.float64)
                    found[index] = float(total), bool(likeliest_BT[row, answer].all())
        for index, (key, *_) in enumerate(requests):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts; long ones in windows that follow one another."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                token_list=tokens,
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
        decode = functools.partial(
            self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        waiting: dict[Request, tuple[int, TextStream]] = {}
        for index, instance in enumerate(requests):
            context, settings = instance.args
            request, stops = self._request(index, context, dict(settings))
            waiting[request] = index, TextStream(decode, stops)
        answers = [""] * len(requests)
        with jax.set_mesh(self._loaded.mesh):
            engine = Engine(self._loaded.model, self._loaded.variables, self._routing, self._slots)
            for request in sorted(waiting, key=lambda request: -len(request.prompt)):
                engine.submit(request)
            for _ in track(
                _ended(engine, waiting, answers), total=len(requests), description="answers"
            ):
                pass
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, answer)
        return answers

    def _request(
        self, index: int, context: str, settings: dict[str, Any]
    ) -> tuple[Request, list[str]]:
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.pop("max_gen_toks", _MAX_NEW_TOKENS))
        drawn = settings.pop("do_sample", None)
        temperature = float(settings.pop("temperature", 0.0 if not drawn else 1.0) or 0.0)
        top_p = float(settings.pop("top_p", 1.0))
        if settings or not 0 < most < self.max_length:
            raise UserError(
                f"the task's generation_kwargs have max_gen_toks {most} (at most "
                f"{self.max_length - 1}) and {', '.join(settings) or 'nothing'} that is unknown; "
                "there are until, max_gen_toks, do_sample, temperature, top_p"
            )
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        ends = frozenset([self.eot_token_id, self._chat.end_of_turn])
        temperature = 0.0 if drawn is False else temperature
        request = Request(prompt, ends, most, temperature, top_p, seed=0, index=index)
        return request, [stop for stop in stops if stop]


def _ended(engine: Engine, waiting: dict[Request, tuple[int, TextStream]], answers: list[str]):
    """Works the engine; yields once for each answer that has ended."""
    while engine.busy:
        for event in engine.step():
            index, text = waiting[event.request]
            if event.token is not None:
                answers[index] += text.add(event.token)
            if event.finish and not text.stopped:
                answers[index] += text.end()
            if event.finish or text.stopped:
                event.request.over = True
                yield index


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Padded length, rows and members of batches, longest first; few shapes are compiled."""
    left = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while left:
        length = bucket(lengths[left[0]])
        rows = whole_rows(max(1, tokens_at_once() // length))
        yield length, rows, left[:rows]
        left = left[rows:]


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, variables, routing, tokens_BT, length_B, prompt_B):
    """Log-probability of each next token, and whether it is the likeliest, both [B, T - 1].

    The first `prompt_B` tokens are the prompt; of all but the last, `length_B` are text.
    """
    targets_BT, tokens_BT = tokens_BT[:, 1:], tokens_BT[:, :-1]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    out = model.apply(
        variables,
        tokens_BT,
        positions_BT,
        (positions_BT < length_B[:, None]).astype(jnp.int32),
        positions_BT < prompt_B[:, None],
        routing,
    )

    def row(hidden_TD, target_T):  # one after the other: logits of all rows are large
        log_p_TV = jax.nn.log_softmax(logits(hidden_TD, out.head))
        own_T = jnp.take_along_axis(log_p_TV, target_T[:, None], axis=1)[:, 0]
        return own_T, log_p_TV.argmax(axis=-1) == target_T

    return jax.lax.map(lambda args: row(*args), (out.hidden_BTD, targets_BT))
