# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Comparing the variants of one MoE layer
#
# Several implementations of the same layer, the FP8 fused Mixture-of-Experts of one tensor-parallel rank, are held
# against the specification, timed on equal terms, and the fastest proven one is chosen for each batch size. This is
# `workbench compare` step by step. On a GPU it takes a real layer; on a CPU, a small one.

# %%
import tempfile
from pathlib import Path

import torch
from IPython.display import Image, Markdown

from workbench import plot, registry, report, timing
from workbench.doctor import Ability, abilities
from workbench.models import shape_of_alias
from workbench.problem import Workload
from workbench.rows import rows, subjects
from workbench.select import choose
from workbench.sweep import failures, measure, open_session, task_of
from workbench.table import Cell, build
from workbench.tune import defaults, tune, verify

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = device.type == "cuda"

# %% [markdown]
# ## The problem
#
# A shape is what one rank holds: E experts of hidden size H and intermediate size I, of which every token visits
# `top_k`. A workload is a shape with M tokens on it, routed by a law, from a seed.

# %%
shape = shape_of_alias("dsv3_tp16" if on_gpu else "tiny")
batch_sizes = (1, 8, 64, 512, 4096) if on_gpu else (1, 4, 16)
workloads = [Workload(shape, num_tokens) for num_tokens in batch_sizes]
shape

# %% [markdown]
# ## The variants
#
# What runs at full speed on a GPU can still be of use without one: Triton variants run in Triton's interpreter, which
# shows whether they are right but not how fast they are, and CUDA variants are compiled for sm_90a.

# %%
usable = abilities(registry.variants(), device)
Markdown("".join(f"- {name}: {how}. {reason}\n" for name, (how, reason) in usable.items()))

# %% [markdown]
# ## Are they right?
#
# Each variant runs in a child process, on inputs from the seed, into an output full of NaN, and is compared with the
# fp32 reference. A wrong answer, a crash and a hang are three different results; none of them ends this notebook. Every
# result goes to a file as it is made, so running this cell again measures nothing twice. What is shown is what is not
# right.

# %% tags=["failures"]
folder = Path(tempfile.mkdtemp(prefix="compare_"))
session = open_session(device, folder / "traces.jsonl", time_limit_s=120, effort=timing.QUICK)

native = [name for name, (how, _) in usable.items() if how is Ability.NATIVE]
interpreted = [name for name, (how, _) in usable.items() if how is Ability.INTERPRETED]

traces = verify(session, workloads, native, limit=2)
traces += measure(
    session,
    "verify in the interpreter",
    [task_of("verify", session, workload, defaults(interpreted, workload)) for workload in workloads],
)
[f"{trace.key.variant}, M={trace.key.num_tokens}: {trace.status}, {trace.message}" for trace in failures(traces)]

# %% [markdown]
# ## How fast are they?
#
# Only what passed is timed. All variants take turns within one run, each call with cold caches and a routing of its
# own. *kernel* is the time from quantised, aligned inputs; *layer* is the time from what a serving engine holds, bf16
# tokens and expert ids. The *floor* is the time that the bytes and multiplications alone would take on this device, for
# the experts that were hit; it is known for GPUs whose ceilings were measured.

# %% tags=["table"]
traces += tune(session, workloads, native, limit=2, keep=1)
table = build(traces, session.environment, registry.variants())
(subject,) = subjects(table)
measured = rows(table, subject, registry.variants(), device)
Markdown(report.markdown(report.times(str(subject), measured)))

# %% tags=["plot"]
plots = {path.stem.rpartition("_")[2]: path for path in plot.save(subject, measured, folder)}
Image(plots["time"])

# %% [markdown]
# ## How close to the reference?
#
# The relative error is ||out - reference|| / ||reference|| over the whole batch.

# %%
Markdown(report.markdown(report.accuracies(str(subject), measured)))

# %% [markdown]
# ## Which one to take?
#
# The default stands unless another variant is faster beyond the noise. Between two measured batch sizes both
# neighbours are asked, so a choice can be made for an M that was never run.

# %% tags=["choice"]
cell = Cell(shape, "uniform", "bf16", "layer")
between = (batch_sizes[0] + batch_sizes[1]) // 2
choices = {M: choose(table, cell, M, registry.variants(), device) for M in (batch_sizes[0], between, batch_sizes[-1])}
Markdown("".join(f"- M={M}: **{choice.variant}**. {choice.reason}\n" for M, choice in choices.items()))
