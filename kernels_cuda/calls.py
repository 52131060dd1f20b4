"""Calls that are made again and again: their launches, ready but for addresses.

What a variant launches depends on the sizes of a batch, on what of it is ready, and on the config. So the parameters of
its launches are filled in once for each of these (a `Call`), and a call on a batch writes the batch's addresses into
them, allocates the memory that the launches share, and enqueues them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from kernels_cuda import launch, workspace
from kernels_cuda.launch import Launch

MAX_KEYS = 256
"""Kinds of calls that a layer keeps ready, a few kilobytes for each; beyond that it begins anew."""
WORD_BYTES = 8


class Call:
    """The launches of one call, of which the taker fills in the addresses of the batch, and enqueues them."""

    __slots__ = ("_device", "_idle", "_launches", "_parts", "_places", "_start", "params")

    def __init__(
        self,
        idle: list[Call],
        device: torch.device,
        parts: workspace.Layout,
        launches: Sequence[Launch],
        places: Sequence[tuple[memoryview, int, int]],
    ) -> None:
        self.params: tuple[Any, ...] = tuple(each.params for each in launches)
        """Of each launch."""
        self._idle, self._device, self._parts, self._launches, self._places = idle, device, parts, launches, places
        self._start = 0

    def enqueue(self) -> None:
        """Enqueue the launches on torch's current stream, and leave this to the next taker."""
        if self._parts.num_bytes:
            memory = workspace.allocate(self._parts, self._device)  # given back at the end, for what comes after
            start = memory.data_ptr()
            if start != self._start:
                for words, index, offset in self._places:
                    words[index] = start + offset
                self._start = start
        stream = launch.current_stream(self._device.index)
        for each in self._launches:
            each.enqueue(stream)
        self._idle.append(self)


class ReadyCalls:
    """The calls of one layer's variant, by what their launches depend on.

    A call has one taker at a time, so threads share nothing: `list.pop` and `list.append` are atomic. One whose launch
    failed is dropped. Nothing here keeps a tensor alive.
    """

    def __init__(self) -> None:
        self._idle: dict[Hashable, list[Call]] = {}

    def take(self, key: Hashable) -> Call | None:
        """A call that is idle, which is the taker's until it is enqueued."""
        try:
            return self._idle[key].pop()
        except (KeyError, IndexError):  # the first of its kind, or all of them are taken
            return None

    def make(
        self,
        key: Hashable,
        device: torch.device,
        parts: workspace.Layout,
        launches: Sequence[tuple[Launch, Mapping[str, str]]],
    ) -> Call:
        """A call that is the taker's until it is enqueued, and idle under `key` from then on.

        parts      the memory that its launches share
        launches   each with its fields that hold the address of a part of another name; a field of the same name as a
                   part holds that part's
        """
        if len(self._idle) >= MAX_KEYS:
            self._idle.clear()
        idle = self._idle.setdefault(key, [])
        places = [place for each, renamed in launches for place in _places(each.params, renamed, parts.offsets)]
        return Call(idle, device, parts, [each for each, _ in launches], places)


def _places(
    params: ctypes.Structure, renamed: Mapping[str, str], offsets: Mapping[str, int]
) -> list[tuple[memoryview, int, int]]:
    """The addresses in `params` that follow the workspace: where each is among the words of 8 bytes, and its offset."""
    words = memoryview(params).cast("B").cast("Q")
    parts = [(index, renamed.get(field, field)) for field, index in _word_of_fields(type(params)).items()]
    return [(words, index, offsets[part]) for index, part in parts if part in offsets]


@functools.cache
def _word_of_fields(params: type[ctypes.Structure]) -> Mapping[str, int]:
    return {field: getattr(params, field).offset // WORD_BYTES for field, *_ in params._fields_}
