"""The child process of worker.py: reads tasks as JSON lines from stdin, answers by JSON lines on a pipe of its own.

Each message has one key: "keys" (of the candidates of a task it has accepted), "step" (what it does next: "inputs",
the index of a candidate, or "timing"), "trace", "done", "refused" (the task is at fault), and "fault" (the device's
context is broken, so it ends; whatever ran in it now would fail for no fault of its own).

Weights, prepared layers and the reference's output stay until another shape or workload needs their memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

import torch

from workbench import bench, environment, registry, timing, verify
from workbench.bench import Contender
from workbench.errors import UnsupportedError, WorkbenchError, one_line
from workbench.generate import make_weights
from workbench.numerics import poisoned_allocations
from workbench.problem import MoEShape, MoEWeights, Workload
from workbench.strict_json import decode, encode
from workbench.trace import Environment, Key, Scope, Status, Trace, now, to_json
from workbench.variant import CompileReport, Support, Variant
from workbench.verify import Case
from workbench.worker import Task

Step = Callable[[int | str], None]
"""Tells the parent what comes next."""


def main() -> None:
    """Serve the parent at the file descriptor that the command line names, until it closes stdin."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", buffering=1) as parent:
        memory: _Memory | None = None
        for line in _lines_of_stdin():
            request = json.loads(line)
            task, effort = decode(Task, request["task"]), decode(timing.Effort, request["effort"])
            try:
                device = _open(task.device)
                if memory is None or memory.device != device:
                    memory = _Memory(device)
                keys = _keys(task, memory.environment)
            except (WorkbenchError, OSError) as error:
                _send(parent, refused=str(error))
                continue
            _send(parent, keys=[encode(key) for key in keys])
            _serve(parent, task, keys, memory, effort)


def _serve(parent: IO[str], task: Task, keys: list[Key], memory: _Memory, effort: timing.Effort) -> None:
    """Do `task`; ends the process when the device's context breaks, or when nobody knows which candidate raised."""
    try:
        for trace in _do(task, keys, memory, effort, lambda step: _send(parent, step=step)):
            fault = _device_fault(memory.device) if trace.status is Status.FAILED else ""
            if fault:
                _end(parent, fault)
            _send(parent, trace=to_json(trace))
    except WorkbenchError as error:
        _send(parent, refused=str(error))
    except Exception as error:
        _end(parent, one_line(error))
    else:
        _send(parent, done=True)


def _do(task: Task, keys: list[Key], memory: _Memory, effort: timing.Effort, step: Step) -> Iterator[Trace]:
    variants = [registry.find(key.variant) for key in keys]
    supported = []
    for i, (variant, key) in enumerate(zip(variants, keys, strict=True)):
        support = _support(task, variant)
        if support:
            supported.append(i)
        else:
            yield from _untried(task, key, Status.UNSUPPORTED, support.reason)
    contenders: dict[int, Contender] = {}
    for i in supported:
        if task.job == "compile":
            step(i)
            yield from _compile(task, variants[i], keys[i])
            continue
        step("inputs")
        case = memory.case(task.workload)
        step(i)
        try:
            contender = Contender(variants[i], memory.prepared(variants[i], case.weights), keys[i].config)
        except Exception as error:
            status = Status.UNSUPPORTED if isinstance(error, UnsupportedError) else Status.FAILED
            yield from _untried(task, keys[i], status, f"prepare: {one_line(error)}")
            continue
        if task.job == "verify":
            trace = verify.verify_one(contender.variant, contender.prepared, case, contender.config, memory.environment)
            if trace.status is Status.WRONG:  # it may have written what others share
                memory.forget()
            yield trace
        else:
            contenders[i] = contender
    if contenders:
        yield from _bench(task, contenders, memory, effort, step)


def _bench(
    task: Task, contenders: dict[int, Contender], memory: _Memory, effort: timing.Effort, step: Step
) -> Iterator[Trace]:
    indices = {contender.label: i for i, contender in contenders.items()}

    def announce(contender: Contender | None) -> None:
        step("timing" if contender is None else indices[contender.label])

    for scope in task.scopes:
        yield from bench.bench(
            task.job,
            list(contenders.values()),
            memory.case(task.workload),
            scope,
            memory.environment,
            timing.backend_of(memory.device),
            effort,
            announce,
        )


def _compile(task: Task, variant: Variant, key: Key) -> Iterator[Trace]:
    """One Trace per kernel, those that are not clean last."""
    made = Trace("compile", Status.PASSED, key, seed=task.workload.seed, created=now())
    try:
        reports = variant.compile(task.workload.shape, [key.config])
    except Exception as error:
        yield dataclasses.replace(made, status=Status.FAILED, message=one_line(error))
        return
    if not reports:
        message = f"{variant.name} has nothing to compile without a GPU"
        yield dataclasses.replace(made, status=Status.UNSUPPORTED, message=message)
    for report in sorted(reports, key=lambda report: not report.clean):
        if report.clean:
            yield dataclasses.replace(made, compiled=report)
        else:
            message = f"{report.kernel}: {_uncleanliness(report)}"
            yield dataclasses.replace(made, status=Status.FAILED, compiled=report, message=message)


def _uncleanliness(report: CompileReport) -> str:
    bytes_used = {"spilled": report.spill_bytes, "of stack": report.stack_bytes}
    return "; ".join([*(f"{count} bytes {what}" for what, count in bytes_used.items() if count), *report.warnings])


def _support(task: Task, variant: Variant) -> Support:
    device = torch.device(task.device)
    if task.job == "compile":
        return Support.yes()
    if task.job in ("bench", "tune") and device.type == "cpu" and variant.backend == "triton":
        return Support.no("the time of Triton's interpreter says nothing about the kernel")
    return variant.supports(task.workload.shape, device)


def _untried(task: Task, key: Key, status: Status, message: str) -> Iterator[Trace]:
    """The Traces of a candidate that did not come to run."""
    scopes: tuple[Scope | None, ...] = task.scopes if task.job in ("bench", "tune") else (None,)
    for scope in scopes:
        yield Trace(task.job, status, key, seed=task.workload.seed, scope=scope, message=message, created=now())


class _Memory:
    """What is kept between tasks on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.environment = environment.current(device)
        self.forget()

    def forget(self) -> None:
        """Drop all tensors."""
        self._weights_of: tuple[MoEShape, int] | None = None
        self._weights: MoEWeights | None = None
        self._prepared: dict[str, Any] = {}
        self._case: Case | None = None

    def case(self, workload: Workload) -> Case:
        """The case of `workload`; drops what belongs to other weights first."""
        if self._case is not None and self._case.workload == workload:
            return self._case
        self._case = None
        if self._weights is None or self._weights_of != (workload.shape, workload.seed):
            self.forget()
            self._weights = make_weights(workload.shape, workload.seed, self.device)
            self._weights_of = workload.shape, workload.seed
        self._case = verify.make_case(workload, self._weights)
        return self._case

    def prepared(self, variant: Variant, weights: MoEWeights) -> Any:
        """What `variant` prepared of `weights`, the ones of the present case; made in poisoned memory."""
        if variant.name not in self._prepared:
            with poisoned_allocations(self.device):
                self._prepared[variant.name] = variant.prepare(weights)
        return self._prepared[variant.name]


def _open(name: str) -> torch.device:
    """The device of that name, made current."""
    device = environment.device_named(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _keys(task: Task, here: Environment) -> list[Key]:
    return [verify.key_of(registry.find(name), config, task.workload, here) for name, config in task.candidates]


def _device_fault(device: torch.device) -> str:
    """What is wrong with the device's context, "" if nothing: a fault in it makes every later call raise."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return one_line(error)
    return ""


def _send(parent: IO[str], **message: Any) -> None:
    parent.write(json.dumps(message) + "\n")


def _end(parent: IO[str], fault: str) -> NoReturn:
    """Exit without clean-up, which would only meet the fault again."""
    _send(parent, fault=fault)
    parent.flush()
    os._exit(1)


def _lines_of_stdin() -> Iterator[str]:
    """Lines from the parent. When it closes the pipe or dies, this process ends at once, whatever runs in it."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield lines.get()


if __name__ == "__main__":
    main()
