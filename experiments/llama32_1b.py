"""Llama-3.2-1B-Instruct with eight domains on a v5e-8: planned, never run.

    safemoe plan --config experiments/llama32_1b.py --topology v5e:2x4

Hardware: TPU v5e-8, 8 chips. Data: eight domains of BeaverTails (CC BY-NC 4.0).

Planned on 2026-11-27 by jax 0.10.2 and libtpu 0.0.42.1: 1,235,814,400 parameters of the base,
27,262,976 of the experts, 262,272 of the router; it fits. How to read it: docs/plans.md.

    topology  function       HBM GiB  TFLOPs  sent GB  compute s   HBM s   ICI s    MFU  tokens/s
    v5e:2x4   train-experts     1.71   30.00     4.00     0.1523  0.0418  0.0200  73.3%   215,163
    v5e:2x4   train-gate        1.57   30.57     3.97     0.1552  0.0453  0.0201  73.1%   211,189
    v5e:2x4   prefill           1.55    4.44     2.21     0.0226  0.0057  0.0112  98.4%   726,140
    v5e:2x4   decode            2.24    0.02     2.19     0.0001  0.0071  0.0110   1.1%     5,838

Hours at least: v5e:2x4 train-experts 0.02, train-gate 0.02, answers 0.04.
"""

from ml_collections import ConfigDict

from experiments import pyrit

DOMAINS = (
    "discrimination_stereotype_injustice",
    "drug_abuse_weapons_banned_substance",
    "financial_crime_property_crime_theft",
    "hate_speech_offensive_language",
    "misinformation_regarding_ethics_laws_and_safety",
    "privacy_violation",
    "self_harm",
    "violence_aiding_and_abetting_incitement",
)


def get_config() -> ConfigDict:
    config = pyrit.get_config()
    config.model.source = "meta-llama/Llama-3.2-1B-Instruct"
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"

    config.data.corpus = "beavertails"
    config.data.domains = DOMAINS
    config.data.sequence_length = 2048

    config.optimizer.experts = pyrit.adamw(learning_rate=5e-4, warmup_steps=20)
    config.optimizer.router = pyrit.adamw(learning_rate=1e-3, warmup_steps=20)
    config.train.experts = pyrit.loop(steps=500, rows=2, validate_every=50, save_every=50)
    config.train.router = pyrit.loop(steps=500, rows=16, validate_every=50, save_every=50)

    config.mesh.fsdp = 8

    config.evaluation.prompts_per_domain = 100
    config.evaluation.max_new_tokens = 256
    config.evaluation.batch_size = 64
    return config
