"""SafeMoE for torch: a base of `transformers`, LoRA experts, and the router that mixes them.

    y = x W  +  scale * sum_e  gates[e] * (x A_e) B_e        gates = router(h)

`h` is the output of a layer's first norm; all projections of the layer share its gates. No other
code than this file runs beside torch, transformers and safetensors; needs Python 3.11.

    import safemoe_torch

    model, tokenizer = safemoe_torch.load(".")
    chat = [{"role": "user", "content": "How do I keep my data private?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(tokens[0]))

The model is the class of `transformers`, with hooks that run the router behind each layer's first
norm and add the experts to the projections. There is no switch that turns the router off.

The prompt is what is read while the cache is empty; without a cache, all that is read. A router of
granularity "sequence" pools over it and then stays as it is: it must be read in one pass.

Shape letters: B batch, T tokens, D input width, O output width, E experts, R rank, L layers, S
router slots (E, or E + 1 where one of them selects no expert).
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def load(directory, dtype=torch.float32, **of_base):
    """Reads the directory that this file came in, after checking the sha256 of all of it.

    Args:
      directory: with manifest.json.
      dtype: of base and experts; the router computes in float32.
      of_base: more arguments of `from_pretrained`, such as device_map. By default attention is
        "eager": the faster kinds pass over Gemma 2's bound of the scores.

    Returns:
      The model and its tokenizer.

    Raises:
      ValueError: where a file was changed, or one is there that the manifest does not list.
      OSError: where one is missing.
    """
    directory = Path(directory)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    for name, sha256 in manifest["files"].items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(f"{directory / name} was changed since its export; copy it again")
    present = {path for path in directory.rglob("*") if path.is_file()}
    listed = {directory / name for name in ("manifest.json", *manifest["files"])}
    if unlisted := [p for p in sorted(present - listed) if "__pycache__" not in p.parts]:
        raise ValueError(f"{unlisted[0]} is not of this export; take it away")
    settings = json.loads((directory / "safemoe.json").read_text(encoding="utf-8"))
    base = directory / "base"
    options = {"attn_implementation": "eager", **of_base, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, local_files_only=True, use_safetensors=True, **options
    )
    model.safemoe = SafeMoE(model, settings, load_file(directory / "safemoe.safetensors"))
    return model, PreTrainedTokenizerFast.from_pretrained(base, local_files_only=True)


class SafeMoE(nn.Module):
    """Router and experts of all layers; holds on to the base by hooks alone."""

    def __init__(self, model, settings, tensors):
        """Puts the hooks on a model.

        Args:
          model: the base.
          settings: domains, scale, and the router's scope, granularity, activation, top_k and
            temperature.
          tensors: of each projection MODULE that carries experts MODULE.lora_A [E, R, D] and
            MODULE.lora_B [E, O, R]; router.kernel [L, D, S] and router.bias [L, S], without L where
            all layers share them.
        """
        super().__init__()
        self.domains = settings["domains"]
        per_layer = settings["router"]["scope"] == "layer"
        router = [tensors["router.kernel"], tensors["router.bias"]]
        self.layers = nn.ModuleList()
        for index, block in enumerate(model.model.layers):
            norm = block.input_layernorm
            layer = Layer(settings, *(leaf[index] if per_layer else leaf for leaf in router))
            norm.register_forward_hook(layer.to(norm.weight.device).route)
            self.layers.append(layer)
        for name in sorted(tensors):
            module, _, leaf = name.rpartition(".")
            if leaf == "lora_A":
                projection = model.get_submodule(module)
                experts = Experts(tensors[name], tensors[f"{module}.lora_B"], settings["scale"])
                experts.to(projection.weight.device, projection.weight.dtype)
                layer = self.layers[int(module.split(".")[2])]  # model.layers.INDEX
                layer.experts[module.rpartition(".")[-1]] = experts
                projection.register_forward_hook(layer.mixture_of(experts))
        if settings["router"]["granularity"] == "sequence":
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end)

    @property
    def gates_LBTE(self):
        """The gates of the last pass."""
        return torch.stack([layer.gates_BTE.cpu() for layer in self.layers])

    def _begin(self, model, args, kwargs):
        """Tells the layers what of this pass is prompt, or what they pooled of it before."""
        tokens_BT = args[0] if args else kwargs["input_ids"]
        cache = _cache_of(kwargs)
        if cache is None or cache.get_seq_length() == 0:
            mask_BT = kwargs.get("attention_mask")
            mask_BT = torch.ones_like(tokens_BT) if mask_BT is None else mask_BT
            if mask_BT.shape != tokens_BT.shape:
                raise ValueError(
                    f"attention_mask is {list(mask_BT.shape)}, tokens are {list(tokens_BT.shape)}; "
                    "this router needs to know which of them are padding: give a mask [B, T]"
                )
            for layer in self.layers:
                layer.prompt_mask_BT, layer.pooled_BS = mask_BT, None
            return
        if (pooled := getattr(cache, "safemoe_pooled", None)) is None or tokens_BT.shape[1] > 1:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens follow {cache.get_seq_length()} in the cache; this "
                "router pools over the prompt: read all of it in one pass into an empty cache, and "
                "then one token at a time"
            )
        for layer, pooled_BS in zip(self.layers, pooled, strict=True):
            layer.prompt_mask_BT, layer.pooled_BS = None, pooled_BS

    def _end(self, model, args, output):
        """What was pooled stays with the cache that this pass filled."""
        cache = _cache_of(output) if isinstance(output, dict) else None
        if cache is not None:
            cache.safemoe_pooled = [layer.pooled_BS for layer in self.layers]


def _cache_of(mapping):
    """transformers 5.24 calls `cache` what was `past_key_values`."""
    return mapping.get("cache" if "cache" in mapping else "past_key_values")


class Experts(nn.Module):
    """The experts of one projection."""

    def __init__(self, a_ERD, b_EOR, scale):
        super().__init__()
        self.scale = scale
        self.register_buffer("a_ERD", a_ERD)
        self.register_buffer("b_EOR", b_EOR)

    def forward(self, x_BTD, gates_BTE):
        z_BTER = torch.einsum("btd,erd->bter", x_BTD, self.a_ERD)
        z_BTER = z_BTER * gates_BTE[..., None].to(z_BTER.dtype)
        return self.scale * torch.einsum("bter,eor->bto", z_BTER, self.b_EOR)


class Layer(nn.Module):
    """One layer's router and experts. `gates_BTE` are those of the last pass."""

    def __init__(self, settings, kernel_DS, bias_S):
        super().__init__()
        self.settings, self.num_experts = settings["router"], len(settings["domains"])
        self.register_buffer("kernel_DS", kernel_DS)
        self.register_buffer("bias_S", bias_S)
        self.experts = nn.ModuleDict()
        self.gates_BTE = self.prompt_mask_BT = self.pooled_BS = None

    def route(self, norm, args, h_BTD):
        """A hook: the norm's output goes on as it is, and makes the gates."""
        logits_BTS = h_BTD.float() @ self.kernel_DS.float()
        if self.settings["granularity"] == "sequence":
            logits_BTS = self._mean_over_prompt(logits_BTS)
        logits_BTS = logits_BTS + self.bias_S.float()
        self.gates_BTE = gates_from_logits(logits_BTS, self.settings, self.num_experts)

    def _mean_over_prompt(self, logits_BTS):
        """Mean over the prompt's tokens up to each; behind the prompt, over all of them."""
        if self.pooled_BS is not None:
            return self.pooled_BS[:, None]
        assert self.prompt_mask_BT is not None  # a pass begins with it, or with what was pooled
        mask_BT1 = self.prompt_mask_BT[..., None].to(logits_BTS)
        mean_BTS = (mask_BT1 * logits_BTS).cumsum(1) / mask_BT1.cumsum(1).clamp(min=1.0)
        self.pooled_BS = mean_BTS[:, -1]
        return mean_BTS

    def mixture_of(self, experts):
        """A hook: adds the experts, by this layer's gates, to a projection's output."""

        def add(projection, args, y_BTO):
            return y_BTO + experts(args[0], self.gates_BTE)

        return add


def gates_from_logits(logits_BTS, settings, num_experts):
    """The activation; then all but the k largest are dropped, the others stay as they are."""
    activation = {
        "softmax": lambda x: x.softmax(-1),
        "softmax_null": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "signed": torch.tanh,
    }[settings["activation"]]
    gates_BTE = activation(logits_BTS / settings["temperature"])[..., :num_experts]
    if k := settings["top_k"]:
        largest_first = gates_BTE.abs().argsort(dim=-1, descending=True, stable=True)
        gates_BTE = gates_BTE.scatter(-1, largest_first[..., k:], 0.0)
    return gates_BTE
