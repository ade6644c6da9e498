"""The headline run: SafeMoE against every control, left-out domains and attacks; plan before run.

    safemoe run --config experiments/headline.py --config.seed=0 --workdir runs/headline/0

Again with seeds 1 and 2, and then

    safemoe report --runs runs/headline/0 runs/headline/1 runs/headline/2

What is compared, and how, was fixed before: docs/headline_plan.md. Stopped at any moment, a run
goes on with the system, fold and benchmark that was not done.

Hardware: 2 CPU cores, 16 GiB of memory.
"""

from ml_collections import ConfigDict

from experiments import pyrit


def get_config() -> ConfigDict:
    config = pyrit.get_config()
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.evaluation.systems = (
        "base",
        "safemoe",
        "base_prompted",
        "uniform",
        "negated",
        "random_router",
        "shuffled_router",
        "constant_gates",
        "best_expert",
        "safe_lora",
        "safe_lora_wide",
        "refusal_lora",
        "refusal_lora_wide",
        "safe_experts",
        "benign_experts",
        "random_experts",
        "permuted_experts",
        "null_experts",
        "harmful_gates",
    )
    config.evaluation.left_out = pyrit.DOMAINS
    config.evaluation.attacks = ("prefix", "two_shot")
    config.evaluation.utility = True
    config.evaluation.benchmarks = (
        "advbench",
        "harmbench",
        "do_not_answer",
        "rho_edgy",
        "rho_pairs_benign",
    )
    config.evaluation.prompts_per_benchmark = 100
    return config
