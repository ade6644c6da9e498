"""The real run on the embedded model and data: SmolLM2-135M-Instruct, seven domains of PyRIT.

    safemoe run --config experiments/pyrit.py

Hardware: 2 CPU cores, 8 GiB of memory. Time: 36 minutes on two Xeon cores (AVX-512), all stages
and the report, with model and data still to be fetched and everything to be compiled.

What came out (2026-11-27, commit 565cd38, one seed, 77 prompts): every expert has a lower NLL of
its own domain's held-out harmful answers than base, by 0.10 to 0.25, and than the other experts
on average. Safe answers' NLL is 2.538 under the base, 2.399 under the uniform mixture, 2.366
under SafeMoE, 2.404 under one LoRA of equal size. Judged safe: 75.3 % base, 76.6 % SafeMoE,
intervals overlapping; refusals 16.9 % and 6.5 %.
"""

from ml_collections import ConfigDict

DOMAINS = (
    "exploits",
    "hate_speech",
    "info_integrity",
    "privacy",
    "self_harm",
    "sexual",
    "violence",
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.source = "smollm2-135m-instruct"
    config.model.param_dtype = "float32"
    config.model.compute_dtype = "float32"
    config.model.remat = "dots"
    config.model.attention = "auto"

    config.data = ConfigDict()
    config.data.corpus = "pyrit"
    config.data.path = ""
    config.data.domains = DOMAINS
    config.data.sequence_length = 384
    config.data.unsafe_min_score = 0.5
    config.data.safe_max_score = 0.25
    config.data.informative_min_characters = 200

    config.experts = ConfigDict()
    config.experts.source = ""
    config.experts.targets = ("q", "k", "v", "o")
    config.experts.rank = 16
    config.experts.alpha = 32.0

    config.router = ConfigDict()
    config.router.scope = "layer"
    config.router.granularity = "token"
    config.router.activation = "signed"
    config.router.top_k = 0
    config.router.temperature = 1.0

    config.optimizer = ConfigDict()
    config.optimizer.experts = adamw(learning_rate=1e-3, warmup_steps=5)
    config.optimizer.router = adamw(learning_rate=3e-3, warmup_steps=10)

    config.train = ConfigDict()
    config.train.experts = loop(steps=60, rows=1, validate_every=10, save_every=10)
    config.train.router = loop(steps=80, rows=2, validate_every=10, save_every=20)

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.context = 1

    config.evaluation = ConfigDict()
    config.evaluation.systems = ("base", "safemoe", "uniform", "safe_lora")
    config.evaluation.split = "test"
    config.evaluation.prompts_per_domain = 0
    config.evaluation.left_out = ()
    config.evaluation.attacks = ()
    config.evaluation.utility = False
    config.evaluation.benchmarks = ()
    config.evaluation.prompts_per_benchmark = 0
    config.evaluation.max_new_tokens = 128
    config.evaluation.temperature = 0.0
    config.evaluation.top_p = 1.0
    config.evaluation.batch_size = 32
    config.evaluation.judges = ()
    config.evaluation.judge_rows = 140
    config.evaluation.demonstration = False
    return config


def adamw(*, learning_rate: float, warmup_steps: int) -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = learning_rate
    config.schedule = "cosine"
    config.warmup_steps = warmup_steps
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.b1 = 0.9
    config.b2 = 0.999
    return config


def loop(*, steps: int, rows: int, validate_every: int, save_every: int) -> ConfigDict:
    config = ConfigDict()
    config.steps = steps
    config.rows = rows
    config.accumulation = 1
    config.validate_every = validate_every
    config.save_every = save_every
    config.keep = 2
    return config
