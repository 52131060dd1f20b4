"""Where the time of a layer call of cuda.sm90_stream goes, on a GPU, at revision 1eccf1c:

    PYTHONPATH=. python experiments/2026-11-28_order/probe.py qwen3next_tp4:256,512,1024,2048 dsv3_tp8:256,1024

us per call by the workbench's timing: `layer` from bf16 tokens; `kernel` from tiles; `tiles ready`: a launch that only
quantises and fills, then the kernel on tiles that are there; and launches on their own: `group` (the tiles), `fill`
(quantise and fill), `all`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from kernels_cuda import sm90_prologue, workspace
from kernels_cuda.launch import Launch, current_stream
from kernels_cuda.sm90_stream import Prepared, SM90Stream, _Params, exchange
from reference.routing import tile_capacity
from workbench import timing
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEInputs, MoEShape, Workload, scale_blocks
from workbench.variant import Config

DEVICE = torch.device("cuda", 0)
Step = Callable[[], None]


def first_launch(
    inputs: MoEInputs, out: torch.Tensor, shape: MoEShape, config: Config, layout: workspace.Layout, address: int, *,
    fills: bool, groups: bool,
) -> Launch:  # fmt: skip
    max_rows = config.integer("max_rows")
    launch = sm90_prologue.bind(
        DEVICE,
        num_out_bytes=out.nbytes if fills else 0,
        num_values=inputs.tokens.numel() if fills else 0,
        num_poison_bytes=layout.num_filled_bytes if fills else 0,
        num_choices=inputs.topk_ids.numel() if groups else 0,
        num_experts=shape.num_experts,
        max_rows=max_rows,
        leaves_room=not groups,
    )
    launch.params.out, launch.params.x = out.data_ptr(), inputs.tokens.data_ptr()
    launch.params.topk_ids, launch.params.poison = inputs.topk_ids.data_ptr(), address
    for part in ("x_q", "x_scale", "sorted_choices", "tiles"):
        setattr(launch.params, part, address + layout.offsets[part])
    return launch


def steps(
    prepared: Prepared, inputs: MoEInputs, aligned: MoEInputs, out: torch.Tensor, config: Config
) -> dict[str, Step]:
    shape, variant, max_rows = prepared.weights.shape, SM90Stream(), config.integer("max_rows")
    num_choices = inputs.topk_ids.numel()
    num_chunks = scale_blocks(shape.intermediate_size)
    marked, others = exchange(num_choices, shape.num_experts, num_chunks, max_rows, config.integer("max_parts"))
    others |= sm90_prologue.quantised_parts(inputs.num_tokens, shape.hidden_size)
    others |= sm90_prologue.tile_parts(num_choices, shape.num_experts, max_rows)
    layout = workspace.layout(marked, others)
    memory = torch.empty(layout.num_bytes, dtype=torch.uint8, device=DEVICE)
    bind = functools.partial(first_launch, inputs, out, shape, config, layout, memory.data_ptr())
    group, fill, everything = (
        bind(fills=False, groups=True),
        bind(fills=True, groups=False),
        bind(fills=True, groups=True),
    )

    params = _Params.from_buffer_copy(prepared.params)
    params.inputs_from_previous_kernel = 1
    params.tile_capacity = tile_capacity(num_choices, max_rows, shape.num_experts)
    params.sorted_choices, params.tiles = aligned.aligned.sorted_choices.data_ptr(), aligned.aligned.tiles.data_ptr()
    params.topk_weights, params.routed_scaling_factor = inputs.topk_weights.data_ptr(), 1.0
    for part in ("sums", "ticket_counter", "sums_written", "activations", "activation_scales", "x_q", "x_scale"):
        setattr(params, part, memory.data_ptr() + layout.offsets[part])
    params.out = out.data_ptr()
    kernel = prepared.kernel(config, False).bind(params, prepared.num_ctas, overlap_previous=True)

    def enqueue(*launches: Launch) -> Step:
        def step(memory: torch.Tensor = memory) -> None:
            for launch in launches:
                launch.enqueue(current_stream(0))

        return step

    return {
        "layer": functools.partial(variant.run, prepared, inputs, out, config),
        "kernel": functools.partial(variant.run, prepared, aligned, out, config),
        "tiles ready": enqueue(fill, kernel),
        "group": enqueue(group),
        "fill": enqueue(fill),
        "all": enqueue(everything),
    }


def main(cells: list[str]) -> None:
    backend, variant = timing.CudaBackend(DEVICE), SM90Stream()
    for alias, numbers in (cell.split(":") for cell in cells):
        shape = shape_of_alias(alias)
        prepared = variant.prepare(make_weights(shape, 0, DEVICE))
        for num_tokens in map(int, numbers.split(",")):
            config = next(iter(variant.configs(shape, num_tokens)))
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            batches = [make_inputs(Workload(shape, num_tokens, seed=seed), DEVICE) for seed in range(4)]
            each = [steps(prepared, batch, variant.align(prepared, batch, config), out, config) for batch in batches]
            armed = [timing.arm(timing.Candidate(name, [one[name] for one in each], True), backend) for name in each[0]]
            found = timing.measure(armed, backend, timing.Effort(num_samples=12))
            print(alias, num_tokens, config, "  ".join(f"{name} {one.median_us:.1f}" for name, one in found.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
