"""Judges on this machine's devices, by the engine that generates: Llama Guard 3, WildGuard, others.

    evaluation.judges = ("llama_guard_3@local#models/Llama-Guard-3-8B",)

A model is whatever `config.model.source` may be. It rests and computes as the base does
(`model.param_dtype`, `model.compute_dtype`), on the same mesh, and is there only while it judges.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jinja2
from jax.sharding import Mesh

from safemoe_jax.config import Config
from safemoe_jax.data.chat import said
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.asked import Asked, AskedJudge, Row, Texts
from safemoe_jax.evaluation.judge_templates import Reply
from safemoe_jax.experiment import boxed_shapes, model_sizes
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import check_divides
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.weights.base import BaseModel, load_base

# In no template, so that it is seen whether one takes them in.
_PROBE: Texts = ("A question that is asked once?", "The one answer to it.")


class LocalJudge(AskedJudge):
    """Asks a model that it reads itself, greedily."""

    def __init__(self, asked: Asked, config: Config, mesh: Mesh, directory: Path) -> None:
        """Reads nothing yet.

        Args:
          asked: what is asked, and whom; its place is `LOCAL`.
          config: the experiment's.
          mesh: the experiment's.
          directory: of the file with all that was asked and replied, judge_NAME.jsonl.

        Raises:
          UserError: where the run has several hosts.
        """
        super().__init__(asked, directory)
        self._config, self._mesh = config, mesh
        if jax.process_count() > 1:
            raise UserError(
                f"judge {self.name} is on one host's devices, and this run has "
                f"{jax.process_count()} hosts; serve {asked.model}, and name it as "
                f"{self.name}@URL#MODEL"
            )

    def check(self) -> None:
        """Whether the model can be read, is cut by the mesh, and has room for what it is asked.

        Raises:
          UserError: where it is not so.
        """
        template, tokenizer, spec = self.asked.template, self._base.tokenizer, self._base.spec
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"judge {self.name}: the tokenizer of {self.asked.model} names no eos_token, so a "
                "reply has no end; add it to its tokenizer_config.json"
            )
        Transformer.from_config(self._config, spec)  # refuses a kernel that cannot compute it
        sizes = model_sizes(spec, self._base.rests, f"judge {self.name}")
        check_divides(self._config.mesh, sizes)
        longest = self._config.evaluation.max_new_tokens
        asked = len(self._ids(self._text(_PROBE)))
        if asked + longest + template.max_tokens > spec.max_positions:
            raise UserError(
                f"judge {self.name}: {self.asked.model} reads {spec.max_positions} tokens; its "
                f"template has {asked}, an answer up to {longest} (evaluation.max_new_tokens) and "
                f"a reply up to {template.max_tokens}; shorten the answers, or take another judge"
            )

    def _ask(self, todo: Mapping[str, Texts], keep: Callable[[Row], None]) -> str:
        self.check()
        texts = {key: self._text(asked) for key, asked in todo.items()}
        prompts = {key: self._ids(text) for key, text in texts.items()}
        room = self._base.spec.max_positions - self.asked.template.max_tokens
        fitting = {key: prompt for key, prompt in prompts.items() if len(prompt) <= room}

        def replied(key: str, reply: Reply) -> None:
            # Greedy: who cannot be read would say the same again.
            keep(self._row(key, todo[key], [{"prompt": texts[key]}], [[reply]]))

        if fitting:
            self._decode(fitting, replied)
        if len(fitting) == len(prompts):
            return ""
        return f"{max(map(len, prompts.values()))} tokens, where {room} can be read"

    def _decode(
        self, prompts: Mapping[str, list[int]], replied: Callable[[str, Reply], None]
    ) -> None:
        """Reads the model, lets it reply to all prompts, and gives its memory back."""
        base, keys = self._base, list(prompts)
        model = Transformer.from_config(self._config, base.spec, rests=base.rests)
        with jax.set_mesh(self._mesh):
            placed = base.placed(shardings(self._mesh, boxed_shapes(model)["params"]))
            ends = frozenset({base.tokenizer.eos_token_id})
            sampler = Sampler(model, {"params": placed}, None, ends)
            for index, generation in sampler.as_they_end(
                list(prompts.values()),
                max_new_tokens=self.asked.template.max_tokens,
                temperature=0.0,
                top_p=1.0,
                seed=0,
                batch_size=self._config.evaluation.batch_size,
                description=f"judge {self.name}",
            ):
                replied(keys[index], Reply(said(base.tokenizer, generation.tokens), None))

    def _text(self, texts: Texts) -> str:
        """What the model reads, but for control tokens that its tokenizer puts before it."""
        (request,) = self.asked.template.requests(*texts)
        if "prompt" in request:
            return request["prompt"]
        return self._rendered(request["messages"], self._in_parts)

    def _ids(self, text: str) -> list[int]:
        # A chat template writes all control tokens itself.
        whole = self.asked.template.request != "text"
        return self._base.tokenizer(text, add_special_tokens=not whole)["input_ids"]

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the chat template wants what a turn says as a list of parts.

        It then leaves text out without a word, as Llama-Guard-3-1B's does: its judge would have
        read empty turns.
        """
        (request,) = self.asked.template.requests(*_PROBE)
        for in_parts in (False, True):
            text = self._rendered(request["messages"], in_parts)
            if all(said in text for said in _PROBE):
                return in_parts
        raise UserError(
            f"judge {self.name}: the chat template of {self.asked.model} leaves out what is "
            f"judged; bring the one of {self.asked.template.models}"
        )

    def _rendered(self, messages: Sequence[Mapping[str, str]], in_parts: bool) -> str:
        tokenizer, turns = self._base.tokenizer, [dict[str, Any](turn) for turn in messages]
        if not tokenizer.chat_template:
            raise UserError(
                f"judge {self.name} is asked by its weights' own chat template, and the tokenizer "
                f"of {self.asked.model} has none; add chat_template to its tokenizer_config.json"
            )
        if in_parts:
            turns = [
                {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
                for turn in turns
            ]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"judge {self.name}: the chat template of {self.asked.model} refuses a prompt and "
                f"its answer ({error}); bring the one of {self.asked.template.models}"
            ) from error
        return str(text)

    @cached_property
    def _base(self) -> BaseModel:
        try:
            return load_base(self.asked.model, self._config.model.param_dtype)
        except UserError as error:
            raise UserError(f"judge {self.name}: {error}") from error

    @property
    def _who(self) -> tuple[str, ...]:
        model = self._config.model
        return self._base.fingerprint, model.param_dtype, model.compute_dtype

    @property
    def _place(self) -> str:
        return self.asked.model
