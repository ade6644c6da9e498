"""How the cost of a step grows with experts, rank, length and batch, and where sparse would pay.

    python benchmarks/scaling.py [--out scaling.html]

On the embedded base's shape with random weights and fewer layers: growth is what is measured, and a
layer grows like its model. Stage one gathers each row's own expert; stage two and decoding mix all
of them densely. Beside the dense mixture stands the sparse one of top-k gates: tokens sorted by
expert and `jax.lax.ragged_dot`, forward alone, over the same projections.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, table
from inputs import config, experiment, random_rows
from ours import Training, seconds

from safemoe_jax.model.lora import dense_mixture

LAYERS, ROWS, LENGTH, RANK, EXPERTS = 2, 4, 256, 16, 8
AXES = {
    "experts": (1, 2, 4, 8, 16, 32, 64),
    "rank": (4, 8, 16, 32, 64),
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "rows": (1, 2, 4, 8, 16),
}
ALONG = {"length": {"rows": 1}, "experts": {"rows": 8}}  # what else differs along an axis


def step_seconds(stage: str, *, experts=EXPERTS, rank=RANK, length=LENGTH, rows=ROWS) -> float:
    """Seconds of one train step; rows belong to the experts in turn."""
    names = tuple(f"domain_{index}" for index in range(experts))
    of = config(data__domains=names, experts__rank=rank, experts__alpha=2.0 * rank)
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(of, directory)
        params = run.base.params
        run.base = dataclasses.replace(
            run.base, spec=dataclasses.replace(run.base.spec, num_layers=LAYERS)
        )
        cut = {"layers": jax.tree.map(lambda x: x[:LAYERS], params["layers"])}
        run.params = run.placed(run.model, "params", params | cut)
        training = Training(run.model, of, stage, run.params)
        batch = random_rows(rows, length, start=length // 2, vocab_size=40_000, experts=experts)
        return seconds(lambda: training.run(batch), 2)


def sparse_mixture(x_ND, a_EDR, b_ERO, gates_Nk, chosen_Nk):
    """The mixture of each token's k chosen experts [N, O]: tokens sorted by expert."""
    experts = a_EDR.shape[0]
    k = chosen_Nk.shape[1]
    order = jnp.argsort(chosen_Nk.ravel())
    sizes_E = jnp.bincount(chosen_Nk.ravel(), length=experts)
    z = jax.lax.ragged_dot(x_ND[order // k], a_EDR, sizes_E)
    z *= gates_Nk.ravel()[order][:, None]
    y = jax.lax.ragged_dot(z, b_ERO, sizes_E)
    return jnp.zeros((x_ND.shape[0], y.shape[1]), y.dtype).at[order // k].add(y)


def mixture_seconds(experts: int, k: int) -> tuple[float, float]:
    """Seconds of one projection's mixture, dense and sparse, for 1,024 tokens of width 576."""
    tokens, width = 1024, 576
    rng = np.random.default_rng(0)
    x, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((tokens, width), (experts, width, RANK), (experts, RANK, width))
    )
    gates = jnp.asarray(rng.normal(size=(tokens, experts)), jnp.float32)
    kept, chosen = jax.lax.top_k(gates, k)
    chosen_only = jnp.zeros_like(gates).at[jnp.arange(tokens)[:, None], chosen].set(kept)
    dense = jax.jit(lambda x, g: dense_mixture(x[None], a, b, g[None])[0])
    sparse = jax.jit(lambda x, g, c: sparse_mixture(x, a, b, g, c))
    difference = jnp.abs(dense(x, chosen_only) - sparse(x, kept, chosen)).max()
    assert difference < 1e-2 * jnp.abs(dense(x, chosen_only)).max(), difference
    return (
        seconds(lambda: jax.block_until_ready(dense(x, chosen_only)), 5),
        seconds(lambda: jax.block_until_ready(sparse(x, kept, chosen)), 5),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the picture goes (.html)")
    out = parser.parse_args().out
    began = time.time()
    curves = {}
    for axis, values in AXES.items():
        for stage in ("experts", "router"):
            fixed = ALONG.get(axis, {})
            curves[axis, stage] = [step_seconds(stage, **fixed, **{axis: v}) for v in values]
    lines = [
        (
            axis,
            stage,
            *(f"{value}: {took:.2f}" for value, took in zip(AXES[axis], times, strict=True)),
        )
        for (axis, stage), times in curves.items()
    ]
    for line in lines:
        print(" | ".join(line))
    crossing = []
    for k in (1, 2):
        for experts in AXES["experts"]:
            if experts >= k:
                dense, sparse = mixture_seconds(experts, k)
                crossing.append(
                    (
                        str(k),
                        str(experts),
                        f"{1e3 * dense:.1f}",
                        f"{1e3 * sparse:.1f}",
                        f"{dense / sparse:.2f}",
                    )
                )
    table(
        "Dense mixture against sparse dispatch, one projection, 1,024 tokens",
        ("top-k", "E", "dense, ms", "sparse, ms", "dense / sparse"),
        crossing,
    )
    if out:
        draw(curves, out)
    print(f"{machine()}; {time.time() - began:.0f} s")


def draw(curves, out: Path) -> None:
    """One panel an axis, both stages, log-log: how many times as long a step takes as the first."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=len(AXES), subplot_titles=list(AXES), shared_yaxes=True)
    for column, (axis, values) in enumerate(AXES.items(), start=1):
        for stage, color in (("experts", "#3b6fb6"), ("router", "#d1495b")):
            times = np.array(curves[axis, stage])
            line = go.Scatter(
                x=values,
                y=times / times[0],
                name=f"stage {stage}",
                line_color=color,
                showlegend=column == 1,
            )
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(type="log", tickvals=values, row=1, col=column)
    figure.update_yaxes(type="log", dtick="D2")
    figure.update_yaxes(title_text="a step, times the first", col=1)
    figure.update_layout(template="plotly_white")
    figure.write_html(out, include_plotlyjs=True)


if __name__ == "__main__":
    main()
