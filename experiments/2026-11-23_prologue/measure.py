"""Checks and times sm90_prologue on a GPU; all parts, or those that are named:

    python experiments/2026-11-23_prologue/measure.py [check] [loop] [times] [sweep]

Times: CUDA graph of 20 calls on the same buffers, no flush, so small batches are L2-warm; median of 15 replays.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import sys
import time

import torch

from experiments.cold_l2 import captured
from kernels_cuda import sm90_prologue as prologue
from reference.quant import quantise_activations
from reference.routing import AlignedRouting, TiledRouting, align_block_size, tile_rows
from workbench.generate import make_inputs
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, RoutingLaw, Workload

DEVICE = torch.device("cuda", 0)
SHAPES = [shape_of_alias("dsv3_tp16"), shape_of_alias("qwen3next_tp4")]
TOKENS = (1, 8, 64, 512, 1024, 2048, 8192)
FAILURES: list[str] = []


def expect(condition: bool, what: str) -> None:
    if not condition:
        FAILURES.append(what)
        if len(FAILURES) <= 20:
            print("FAILED", what, flush=True)


def same_choices(found, expected, ids) -> bool:
    """The same choices at the same experts' places, in any order within an expert; padding is ids.numel()."""
    experts = torch.cat([ids.flatten(), ids.new_tensor([1 << 30])]).long()
    found, expected = found.long(), expected.long()
    if int(found.min() if found.numel() else 0) < 0 or int(found.max() if found.numel() else 0) > ids.numel():
        return False
    return torch.equal(experts[found], experts[expected]) and torch.equal(found.sort().values, expected.sort().values)


def check_aligned(found: AlignedRouting, expected: AlignedRouting, ids, name: str) -> None:
    expect(torch.equal(found.num_tokens_post_padded, expected.num_tokens_post_padded), f"{name}: padded total")
    expect(torch.equal(found.expert_ids, expected.expert_ids), f"{name}: expert_ids")
    expect(same_choices(found.sorted_token_ids, expected.sorted_token_ids, ids), f"{name}: sorted_token_ids")


def check_tiled(found: TiledRouting, expected: TiledRouting, ids, name: str) -> None:
    num_tiles, num_rows = expected.tiles[0, :2].tolist()
    expect(torch.equal(found.tiles[: 1 + num_tiles], expected.tiles[: 1 + num_tiles]), f"{name}: tiles")
    expect(same_choices(found.sorted_choices[:num_rows], expected.sorted_choices[:num_rows], ids), f"{name}: choices")


class Buffers:
    def __init__(self, shape: MoEShape, num_tokens: int):
        size = num_tokens, shape.hidden_size
        self.out = torch.full(size, float("nan"), dtype=torch.bfloat16, device=DEVICE)
        self.x_q = torch.full(size, 0x55, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
        self.x_scale = torch.full((num_tokens, shape.hidden_size // 128), -1.0, device=DEVICE)
        self.poison = torch.zeros(4096 * num_tokens + 48, dtype=torch.uint8, device=DEVICE)

    def check(self, x, name: str) -> None:
        x_q, x_scale = quantise_activations(x)
        wrong = (self.x_q.view(torch.uint8) != x_q.view(torch.uint8)).sum().item()
        expect(wrong == 0, f"{name}: {wrong} of {x_q.numel()} codes")
        expect(torch.equal(self.x_scale, x_scale), f"{name}: scales")
        expect(not self.out.view(torch.int16).any().item(), f"{name}: zero")
        expect((self.poison == 255).all().item(), f"{name}: poison")


def empty(form: str, ids, num_experts: int, rows: int) -> AlignedRouting | TiledRouting:
    make = prologue.empty_tiles if form == "tiles" else prologue.empty_alignment
    routing = make(ids.numel(), num_experts, rows, DEVICE)
    for tensor in vars(routing).values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(-7)
    return routing


def check_routing(routing, ids, num_experts: int, name: str) -> None:
    if isinstance(routing, TiledRouting):
        check_tiled(routing, tile_rows(ids, routing.max_rows, num_experts), ids, name)
    else:
        check_aligned(routing, align_block_size(ids, routing.block_size, num_experts), ids, name)


def check() -> None:
    began, count = time.time(), 0
    extra = [MoEShape(8, 256, 128, 1), MoEShape(1024, 256, 128, 32), MoEShape(16, 128, 128, 2)]
    for shape in (*SHAPES, *extra):
        for num_tokens, law, dropped in itertools.product(
            (*TOKENS, 3, 131072) if shape in extra else TOKENS, ("uniform", "zipf:1.2", "one-expert"), (0.0, 0.4, 1.0)
        ):
            if num_tokens == 131072 and (law == "zipf:1.2" or dropped == 1.0 or shape.num_experts == 1024):
                continue
            inputs = make_inputs(Workload(shape, num_tokens, RoutingLaw.parse(law), 3, dropped=dropped), DEVICE)
            ids = inputs.topk_ids
            for form, rows in itertools.product(("tiles", "blocks"), (8, 64, 128, 256)):
                name = f"{shape} M={num_tokens} {law} dropped={dropped} {form} of {rows}"
                routing = empty(form, ids, shape.num_experts, rows)
                prologue.launch(topk_ids=ids, num_experts=shape.num_experts, aligned=routing)
                check_routing(routing, ids, shape.num_experts, name)
                count += 1
            buffers = Buffers(shape, num_tokens)
            routing = empty("tiles", ids, shape.num_experts, 32)
            quantised = buffers.x_q, buffers.x_scale
            inputs.x[:, ::37] = -0.0
            prologue.launch(
                out=buffers.out, x=inputs.x, quantised=quantised, topk_ids=ids, num_experts=shape.num_experts,
                aligned=routing, poison=buffers.poison,
            )  # fmt: skip
            name = f"{shape} M={num_tokens} {law} dropped={dropped} all"
            check_routing(routing, ids, shape.num_experts, name)
            buffers.check(inputs.x, name)
    # All bf16 bit patterns that are finite, against largest values of every mantissa and many exponents.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()].to(DEVICE)
    for exponent in (-126, -60, -34, -33, -8, 0, 5, 60, 127):
        mantissas = (1 + torch.arange(128, device=DEVICE) / 128).ldexp(torch.tensor(exponent, device=DEVICE)).bfloat16()
        values = patterns.repeat(128, 1)
        values = torch.where(values.abs() <= mantissas[:, None], values, torch.zeros_like(values))
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % 127)).view(128, -1, 127)
        x = torch.cat([values, mantissas[:, None, None].expand(-1, values.shape[1], 1)], dim=2).flatten(1).contiguous()
        x_q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        x_scale = torch.empty(x.shape[0], x.shape[1] // 128, device=DEVICE)
        prologue.launch(x=x, quantised=(x_q, x_scale))
        expected_q, expected_scale = quantise_activations(x)
        expect(torch.equal(x_scale, expected_scale), f"exponent {exponent}: scales")
        wrong = (x_q.view(torch.uint8) != expected_q.view(torch.uint8)).sum().item()
        expect(wrong == 0, f"exponent {exponent}: {wrong} codes")
    print(f"check: {count} routings, {len(FAILURES)} failures, {time.time() - began:.0f} s", flush=True)


def loop() -> None:
    """1000 launches of mixed M on two streams at a time, none waited for before the next."""
    draw = random.Random(0)
    cases = []
    for shape, num_tokens, law in itertools.product(SHAPES, (1, 3, 8, 64, 300, 1024, 4096), ("uniform", "zipf:1.2")):
        inputs = make_inputs(Workload(shape, num_tokens, RoutingLaw.parse(law), 5, dropped=0.2), DEVICE)
        for form, rows in (("tiles", 16), ("tiles", 128), ("blocks", 32)):
            reference = tile_rows if form == "tiles" else align_block_size
            cases.append((shape, inputs, form, rows, reference(inputs.topk_ids, rows, shape.num_experts)))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    failed = len(FAILURES)
    for _ in range(20):
        torch.cuda.synchronize()
        launched = []
        for _ in range(50):
            case = draw.choice(cases)
            shape, inputs, form, rows, _ = case
            launched.append((case, empty(form, inputs.topk_ids, shape.num_experts, rows), Buffers(shape, 1)))
        torch.cuda.synchronize()
        for i, ((shape, inputs, _, _, _), routing, buffers) in enumerate(launched):
            with torch.cuda.stream(streams[i % 2]):
                prologue.launch(
                    x=inputs.x[:1], quantised=(buffers.x_q, buffers.x_scale), out=buffers.out, poison=buffers.poison,
                    topk_ids=inputs.topk_ids, num_experts=shape.num_experts, aligned=routing,
                )  # fmt: skip
        torch.cuda.synchronize()
        for (shape, inputs, form, rows, expected), routing, buffers in launched:
            compare = check_tiled if form == "tiles" else check_aligned
            compare(routing, expected, inputs.topk_ids, f"loop {shape} M={inputs.num_tokens} {form} of {rows}")
            buffers.check(inputs.x[:1], f"loop {shape}")
    print(f"loop: 1000 launches, {len(FAILURES) - failed} failures", flush=True)


def graph_us(call, calls: int = 20, samples: int = 15) -> float:
    graph = captured(lambda _: call(), calls)
    times = []
    for _ in range(samples + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[2:])


def parts(shape: MoEShape, num_tokens: int, max_rows: int = 64) -> dict[str, dict]:
    inputs, buffers = make_inputs(Workload(shape, num_tokens), DEVICE), Buffers(shape, num_tokens)
    ids = inputs.topk_ids
    routed = {"topk_ids": ids, "num_experts": shape.num_experts}
    tile = {**routed, "aligned": empty("tiles", ids, shape.num_experts, max_rows)}
    zero, quantise = {"out": buffers.out}, {"x": inputs.x, "quantised": (buffers.x_q, buffers.x_scale)}
    return {
        "tile": tile,
        "align": {**routed, "aligned": empty("blocks", ids, shape.num_experts, 32)},
        "quantise": quantise,
        "zero": zero,
        "poison": {"poison": buffers.poison},
        "tile+quantise": {**tile, **quantise},
        "all": {**tile, **quantise, **zero, "poison": buffers.poison},
    }


def times() -> None:
    print("us a call in a graph of 20, L2 warm where it fits; floors = 2 us + bytes / 4.6 TB/s: tile+quantise, all")
    for shape in SHAPES:
        for num_tokens in TOKENS:
            cells = {name: graph_us(lambda: prologue.launch(**part)) for name, part in parts(shape, num_tokens).items()}  # noqa: B023
            quantised = num_tokens * shape.hidden_size * 3
            everything = quantised + num_tokens * (shape.hidden_size * 2 + 4096)
            print(
                f"{shape} M={num_tokens:5d}: " + "  ".join(f"{name} {value:6.1f}" for name, value in cells.items())
                + f"  floors {2 + quantised / 4.6e6:.1f} {2 + everything / 4.6e6:.1f}", flush=True
            )  # fmt: skip


def sweep() -> None:
    """Routing alone, and with quantising, by the number of clusters; '1x1' is one CTA without a cluster."""
    chosen = prologue._routing_ctas
    for shape in SHAPES:
        for num_tokens in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            all_parts, texts = parts(shape, num_tokens), []
            for cluster_size, num_clusters in ((1, 1), (8, 1), (8, 2), (8, 3), (8, 4), (8, 6), (8, 8)):
                prologue._routing_ctas = lambda *_: (cluster_size, cluster_size * num_clusters)  # noqa: B023
                cells = [
                    graph_us(functools.partial(prologue.launch, **all_parts[name]))
                    for name in ("tile", "align", "tile+quantise")
                ]
                texts.append(f"{cluster_size}x{num_clusters} " + "/".join(f"{cell:.1f}" for cell in cells))
            prologue._routing_ctas = chosen
            name = "x".join(map(str, chosen(num_tokens * shape.top_k, "tiles")))
            print(f"{shape} M={num_tokens} tile/align/tile+quantise (default {name}): " + "  ".join(texts), flush=True)


if __name__ == "__main__":
    report = prologue.compiled(groups=True).log.split("Used")[1].splitlines()[0]
    prologue.warm(DEVICE)
    resident = {size: prologue._kernel(size, DEVICE, groups=True).max_clusters for size in (1, 8)}
    print(f"registers and shared memory: Used{report}; resident clusters by size: {resident}")
    wanted = sys.argv[1:] or ["check", "loop", "times", "sweep"]
    for name in wanted:
        {"check": check, "loop": loop, "times": times, "sweep": sweep}[name]()
    sys.exit(1 if FAILURES else 0)
