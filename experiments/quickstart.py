"""A demonstration: the real pipeline on the real model and data, cut to minutes.

    launch/quickstart.sh

It is far too short to judge the claim, and its report says so; the real run is
experiments/pyrit.py. Hardware: 2 CPU cores, 8 GiB of memory.
"""

from ml_collections import ConfigDict

from experiments import pyrit


def get_config() -> ConfigDict:
    config = pyrit.get_config()
    config.data.sequence_length = 192
    config.train.experts = pyrit.loop(steps=6, rows=1, validate_every=6, save_every=3)
    config.train.router = pyrit.loop(steps=10, rows=2, validate_every=10, save_every=5)
    config.optimizer.experts.warmup_steps = 1
    config.optimizer.router.warmup_steps = 1
    config.optimizer.router.learning_rate = 1e-2
    config.evaluation.prompts_per_domain = 1
    config.evaluation.max_new_tokens = 48
    config.evaluation.judge_rows = 28
    config.evaluation.demonstration = True
    return config
