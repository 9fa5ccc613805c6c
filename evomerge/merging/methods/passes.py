"""Pass: one walk over the elements of a tensor, the last step of nearly every merge.

A pass is a function of chunks. It is compiled into one loop, or run eagerly over chunks that stay in the cache. Both
ways do the same operations in the same order and precision, so on a CPU the bits are the same. On a GPU, compiled code
may fuse a multiplication with an addition, so it is used there only where the search file asks for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import pad

from evomerge.devices import accelerator, device_count
from evomerge.merging.methods.drawn import ROW, Drawn, Field, columns_on, draw, field_part
from evomerge.merging.methods.parts import STAGED, Elements, walk, whole_of

Number = float | np.int32 | torch.Tensor
Numbers = Mapping[str, tuple[torch.Tensor, ...]]
Tensors = tuple[torch.Tensor, ...]
T = TypeVar("T")
Element = Callable[[Tensors, Tensors, Numbers], torch.Tensor]
Slope = tuple[str, int, torch.Tensor]
Slopes = Callable[[Tensors, Tensors, Numbers], Iterator[Slope]]

ROOM = 1 << 23  # bytes that an eager pass takes at a time: enough to make calls cheap, few enough for the cache
_WIDE_ROOM = 1 << 28  # where there are thousands of cores to feed
_COMPILED_FROM = 1 << 18  # elements; for fewer, chunks cost no more than compiled code does
_FEWEST_ROWS = 2  # code for one row would be compiled apart
_VARIANTS = 64  # of an element's compiled code on each device, at most: numbers of models, dtypes and shapes


@dataclass(frozen=True, slots=True)
class Pass:
    """The last step of the merge of one tensor: a function of its elements, and what it is applied to.

    element: (tensors, fields, numbers) -> float32 tensor. Each element of the result depends only on the same element
        of the tensors and fields. The tensors are float32 copies, which it may overwrite. It is hashable, since
        compiled code is kept under it.
    tensors: the models' tensors, of any float dtype, wherever they lie.
    numbers: scalar tensors by name.
    fields: integer tensors whose last dimension is the elements, or fields that are made again chunk by chunk.
    factor: the number that the only tensor is multiplied by, where `element` does nothing else; otherwise None.
    slopes: takes what `element` takes, and yields for numbers on which the result depends smoothly their name, their
        index, and the derivative of each element; None where there is none.
    """

    element: Element
    tensors: tuple[Elements, ...]
    numbers: Numbers = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    factor: float | None = None
    slopes: Slopes | None = None


def numbers_on(device: torch.device, **values: Sequence[Number]) -> Numbers:
    """Numbers as scalar tensors on a device, by name: float32, or int32 where they are NumPy's int32.

    device: where they are to be.
    values: numbers of Python and NumPy, which are moved all at once, and scalar tensors that are on the device already.
    """
    given = [value for group in values.values() for value in group if not isinstance(value, torch.Tensor)]
    whole = torch.tensor([value for value in given if isinstance(value, np.int32)], dtype=torch.int32)
    plain = torch.tensor([value for value in given if not isinstance(value, np.int32)], dtype=torch.float32)
    moved = torch.cat([whole, plain.view(torch.int32)]).to(device)
    integers, floats = iter(moved[: len(whole)].unbind()), iter(moved[len(whole) :].view(torch.float32).unbind())

    def scalar(value: Number) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.reshape(()).to(torch.float32).to(device)
        return next(integers if isinstance(value, np.int32) else floats)

    return {name: tuple(scalar(value) for value in group) for name, group in values.items()}


def room_on(device: torch.device) -> int:
    """How many bytes an eager pass on a device takes at a time, counting float32 copies of tensors, and fields."""
    return ROOM if device.type == "cpu" else _WIDE_ROOM


def write(out: torch.Tensor, work: Pass | Elements, compiled: bool = False, room: int | None = None) -> None:
    """Writes the result of a pass into `out`, rounded once into its dtype.

    out: a tensor of the shape of the merge.
    work: a pass, or a finished merge, which is copied.
    compiled: whether a large tensor is merged by compiled code.
    room: how many bytes to take at a time; by default what suits the device.
    """
    if isinstance(work, torch.Tensor):
        out.copy_(work.reshape(out.shape))
        return
    if isinstance(work, Pass) and work.factor is not None and work.tensors[0].dtype == out.dtype:
        # torch multiplies any dtype by a number in float32 and rounds once, so no copy has to be widened.
        if isinstance(work.tensors[0], torch.Tensor) or not out.is_contiguous():
            torch.mul(whole_of(work.tensors[0]).reshape(out.shape), work.factor, out=out.detach())
            return
        for piece, (part,) in walk(work.tensors, range(0, out.numel(), STAGED)):
            torch.mul(part, work.factor, out=out.detach().view(-1)[piece])
        return
    if not out.is_contiguous():
        whole = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        write(whole, work, compiled, room)
        out.copy_(whole)
        return
    flat = out.detach().view(-1)
    if not isinstance(work, Pass):
        for piece, (part,) in walk((work,), range(0, flat.numel(), STAGED)):
            flat[piece].copy_(part)
    elif compiled and flat.numel() >= _COMPILED_FROM:
        _compiled_chunks(flat, work)
    else:
        per_element = 4 * len(work.tensors) + sum(_width(field) for field in work.fields)
        _in_chunks(flat, work, max(1, (room or room_on(flat.device)) // per_element))


def _width(field: Field) -> int:
    """How many bytes a field has for each element; while numbers are made, there are some of 32 bits."""
    return 12 if isinstance(field, Drawn) else field.nbytes // max(1, field.shape[-1])


def _in_chunks(flat: torch.Tensor, work: Pass, size: int) -> None:
    """Writes the result of a pass chunk by chunk. All chunks are widened into the same memory, which stays in the
    cache."""
    size = min(1 << size.bit_length() - 1, STAGED)  # a power of two: no chunk crosses a multiple of 2^32
    longest = min(size, flat.numel())
    room = [torch.empty(longest, dtype=torch.float32, device=flat.device) for _ in work.tensors]
    for piece, parts in walk(work.tensors, range(0, flat.numel(), size)):
        out = flat[piece]
        wide = tuple(own[: len(out)].copy_(part) for own, part in zip(room, parts, strict=True))
        fields = tuple(field_part(field, piece, flat.device) for field in work.fields)
        out.copy_(work.element(wide, fields, work.numbers))


def _compiled_chunks(flat: torch.Tensor, work: Pass) -> None:
    """Writes the result of a pass by compiled code: all at once where all of it is in the device's memory."""
    if any(isinstance(field, Drawn) for field in work.fields):
        _compiled_rows(flat, work)
        return
    step = _compiled(work.element, (False,) * len(work.fields))
    kept = all(isinstance(tensor, torch.Tensor) for tensor in work.tensors)
    for piece, parts in walk(work.tensors, range(0, flat.numel(), flat.numel() if kept else STAGED)):
        fields = tuple(field[..., piece] for field in work.fields if isinstance(field, torch.Tensor))
        step(flat[piece], parts, fields, dict(work.numbers), None)


def _compiled_rows(flat: torch.Tensor, work: Pass) -> None:
    """Writes the result of a pass whose numbers are made again, by compiled code that takes whole rows of them. What is
    left over at the end of a tensor is filled up with zeros."""
    step = _compiled(work.element, tuple(isinstance(field, Drawn) for field in work.fields))
    columns = columns_on(flat.device)
    for piece, parts in walk(work.tensors, range(0, flat.numel(), STAGED)):
        for cut in _whole_rows_and_rest(piece.stop - piece.start):
            within = slice(piece.start + cut.start, piece.start + cut.stop)
            rows = max(_FEWEST_ROWS, -(-(cut.stop - cut.start) // ROW))
            fields = tuple(
                field.rows(within.start, rows, flat.device)
                if isinstance(field, Drawn)
                else _in_rows(field[..., within], rows)
                for field in work.fields
            )
            out = _in_rows(flat[within], rows)
            step(out, tuple(_in_rows(part[cut], rows) for part in parts), fields, dict(work.numbers), columns)
            if out.numel() > cut.stop - cut.start:
                flat[within].copy_(out.flatten()[: cut.stop - cut.start])


def _whole_rows_and_rest(count: int) -> list[slice]:
    """What of `count` elements fills whole rows, and the rest; without those that are empty."""
    whole = count // ROW * ROW if count >= _FEWEST_ROWS * ROW else 0
    return [cut for cut in (slice(0, whole), slice(whole, count)) if cut.start < cut.stop]


def _in_rows(elements: torch.Tensor, rows: int) -> torch.Tensor:
    """The elements of the last dimension in rows: a view, or a copy with zeros at its end where they do not fill the
    rows."""
    lacking = rows * ROW - elements.shape[-1]
    filled = (pad(elements, (0, lacking)) if lacking else elements).view(*elements.shape[:-1], rows, ROW)
    torch._dynamo.mark_static(filled, filled.dim() - 1)
    return filled


def for_each_chunk(work: Callable[[int], T], starts: range, device: torch.device) -> list[T]:
    """The results of `work` for every chunk, in order.

    work: start of a chunk -> its result.
    starts: where the chunks start.
    device: where the tensor is. On the meta device all chunks are alike, so only the first is worked on.
    """
    return [work(start) for start in (starts[:1] if device.type == "meta" else starts)]


Step = Callable[[torch.Tensor, Tensors, Tensors, Numbers, torch.Tensor | None], None]


@cache
def _compiled(element: Element, made: tuple[bool, ...]) -> Step:
    """A pass as compiled code: a function of where it writes, tensors, fields, numbers, and the places in a row
    (`drawn.columns_on`), where fields are made again.

    made: which of the fields are made again from their rows (`Drawn.rows`).
    """
    limits, more = torch._dynamo.config, _VARIANTS * max(1, device_count(accelerator()))
    limits.recompile_limit += more  # since the code of all elements counts together
    limits.accumulated_recompile_limit += more

    def step(
        out: torch.Tensor, tensors: Tensors, fields: Tensors, numbers: Numbers, columns: torch.Tensor | None
    ) -> None:
        wide = tuple(tensor.to(torch.float32, copy=True) for tensor in tensors)
        numbered = [
            own if columns is None or not again else draw(own, columns) for own, again in zip(fields, made, strict=True)
        ]
        out.copy_(element(wide, tuple(numbered), numbers))

    return torch.compile(step, dynamic=True, fullgraph=True)
