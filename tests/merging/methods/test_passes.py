"""Passes: the same bits compiled, in chunks, on any number of threads, and into any memory."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merging.methods import METHODS, passes
from evomerge.merging.methods.base import Inputs, unmeasured
from evomerge.merging.methods.drawn import ROW, Drawn
from evomerge.merging.methods.kernels import as_field, field_steps, uniform_field
from evomerge.merging.methods.passes import ROOM, Pass, for_each_chunk, numbers_on, write
from tests.merging.methods.measured import statistics

SHAPE = (3, (1 << 18) + 77)  # chunks that end within rows
VALUES = {
    "density": [0.5, 0.6, 0.75],
    "weight": [0.4, 0.3, -0.2],
    "scale": [0.7] * 3,
    "gamma": [0.01] * 3,
    "threshold": [0.4] * 3,
}
COMPILED = [
    "linear",
    "dare_ties",
    *(
        pytest.param(method, marks=pytest.mark.exhaustive)
        for method in ("ties", "della", "consensus", "localize_and_stitch", "fisher", "gradient_matching")
    ),
]


def inputs_of(method: str, planes: bool = False, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    row, generator = METHODS[method], torch.Generator().manual_seed(4)
    base = torch.randn(SHAPE, generator=generator).to(dtype)
    models = [(base + 0.1 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(row.most or 3)]
    fields = [uniform_field(0, position, "tensor", base.numel(), "cpu") for position in range(len(models))]
    return Inputs(
        base=base if row.uses_base else None,
        tensors=tuple(models),
        per_model=tuple(
            {known.name: VALUES.get(known.name, [0.1] * 3)[index] for known in row.per_model}
            for index in range(len(models))
        ),
        shared={known.name: 0.3 if known.default is None else known.default for known in row.shared},
        uniforms=lambda index: as_field(fields[index], planes),
        rescale="density",
        planes=planes,
        statistic=statistics(base) if row.statistics else unmeasured,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("method", COMPILED)
def test_compiled_code_gives_the_bits_of_eager_code(method):
    """One method of each kind of pass, to spare the compiler."""
    eager, compiled = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE, dtype=torch.bfloat16)
    METHODS[method].merge_into(eager, inputs_of(method))
    METHODS[method].merge_into(compiled, inputs_of(method, planes=True), compiled=True)
    assert torch.equal(eager.view(torch.int16), compiled.view(torch.int16))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("method", ["dare_ties", pytest.param("della", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("count", [1 << 18, (1 << 18) + 1, (1 << 18) + ROW, (1 << 18) + ROW + 5])
def test_compiled_code_that_makes_numbers_again_gives_the_bits_of_eager_code_however_a_tensor_ends(
    method, count, monkeypatch
):
    monkeypatch.setattr(passes, "STAGED", 1 << 17)
    generator = torch.Generator().manual_seed(4)
    base, *models = (torch.randn(count, generator=generator).bfloat16() for _ in range(4))
    inputs = dataclasses.replace(
        inputs_of(method), base=base, tensors=tuple(models), uniforms=lambda index: Drawn(0, index, "tensor")
    )
    eager, compiled = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16)
    METHODS[method].merge_into(eager, inputs)
    METHODS[method].merge_into(compiled, dataclasses.replace(inputs, planes=True), compiled=True)
    assert torch.equal(eager.view(torch.int16), compiled.view(torch.int16))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_chunks_changes_no_bit(method):
    whole, parts = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE, dtype=torch.bfloat16)
    METHODS[method].merge_into(whole, inputs_of(method), room=1 << 25)
    METHODS[method].merge_into(parts, inputs_of(method), room=159_991)
    assert torch.equal(whole.view(torch.int16), parts.view(torch.int16))


class Kept(dict[Hashable, Any]):
    """What candidates share, made once."""

    def __call__(self, what: Hashable, models: tuple[int, ...], make: Callable[[], Any], /) -> Any:
        if (what, models) not in self:
            self[what, models] = make()
        return self[what, models]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sce", [{"select_topk": share} for share in (0.0, 1 / 65536, 0.25, 0.75, 65535 / 65536, 1.0)]),
        ("ties", [{}]),
        ("breadcrumbs", [{}]),
        ("dare_ties", [{}]),
        ("localize_and_stitch", [{}]),
    ],
)
@pytest.mark.parametrize("planes", [False, True])
def test_what_is_kept_for_candidates_changes_no_bit(method, parameters, planes):
    kept = Kept()
    for each in parameters:
        inputs = dataclasses.replace(inputs_of(method, planes), rescale="l1", drawn=("a", "b", "c"))
        inputs = dataclasses.replace(inputs, shared={**inputs.shared, **each})
        afresh, from_tables = torch.empty(SHAPE), torch.empty(SHAPE)
        METHODS[method].merge_into(afresh, inputs)
        METHODS[method].merge_into(from_tables, dataclasses.replace(inputs, once=kept))
        assert torch.equal(afresh.view(torch.int32), from_tables.view(torch.int32))
    assert kept


def double(tensors, fields, numbers):
    return tensors[0].to(torch.float32) * numbers["factor"][0]


@pytest.mark.parametrize("count", [0, 1, ROOM // 4, ROOM // 2 + 5])
def test_every_element_is_written_once(count):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(3))
    out = torch.full((count,), float("nan"))
    write(out, Pass(double, (tensor,), numbers_on(tensor.device, factor=[2.0])))
    assert torch.equal(out, tensor * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiplying_at_once_rounds_as_multiplying_in_float32_does(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.rand(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 4 - 2
    for factor in (*numbers.tolist(), 0.0, 1e-3):
        work = Pass(double, (every,), numbers_on(every.device, factor=[factor]))
        in_float32, at_once = torch.empty_like(every), torch.empty_like(every)
        write(in_float32, work)
        write(at_once, dataclasses.replace(work, factor=factor))
        numeric = ~in_float32.isnan()
        assert torch.equal(in_float32.isnan(), at_once.isnan())
        assert torch.equal(in_float32.view(torch.int16)[numeric], at_once.view(torch.int16)[numeric])


def test_a_product_in_another_dtype_is_rounded_once():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    out = torch.empty(1000)
    write(out, Pass(double, (tensor,), numbers_on(tensor.device, factor=[0.3]), factor=0.3))
    assert torch.equal(out, tensor.to(torch.float32) * 0.3)


def test_a_pass_may_write_into_a_transposed_tensor():
    tensor = torch.randn((5, 7), generator=torch.Generator().manual_seed(3))
    out = torch.empty(7, 5).t()
    write(out, Pass(double, (tensor,), numbers_on(tensor.device, factor=[2.0])))
    assert torch.equal(out, tensor * 2)


def test_numbers_keep_their_order_and_whole_ones_their_bits():
    largest, least = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    given = {
        "mixed": [1, 0.1, np.int32(largest), -math.inf],
        "none": [],
        "made": [torch.tensor(0.3, dtype=torch.float64), np.int32(least)],
    }
    numbers = numbers_on(torch.device("cpu"), **given)
    assert {name: len(group) for name, group in numbers.items()} == {"mixed": 4, "none": 0, "made": 2}
    assert [number.item() for number in numbers["mixed"]] == [1.0, np.float32(0.1), largest, -math.inf]
    assert [number.item() for number in numbers["made"]] == [np.float32(0.3), least]
    whole = [number.dtype == torch.int32 for group in numbers.values() for number in group]
    assert whole == [False, False, True, False, False, True]


def test_results_of_chunks_come_in_order_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert for_each_chunk(lambda start: start, range(0, 50, 7), torch.device("cpu")) == list(range(0, 50, 7))
    finally:
        torch.set_num_threads(before)


def test_planes_hold_the_numbers_of_a_field():
    field = torch.arange(-32768, 32768).to(torch.int16)
    assert torch.equal(field_steps(field), torch.arange(65536.0))
    assert torch.equal(field_steps(as_field(field, planes=True)), torch.arange(65536.0))


def test_code_is_compiled_for_however_many_methods_a_search_has(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(passes, "_COMPILED_FROM", 1)
    monkeypatch.setattr(passes, "_VARIANTS", 2)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=0, accumulated_recompile_limit=0):
        for function in (torch.neg, torch.abs, torch.square, torch.exp, torch.sin):
            for dtype in (torch.float32, torch.bfloat16):
                out, twos = torch.empty(8, dtype=dtype), torch.full((8,), 2.0, dtype=dtype)
                write(out, Pass(Applied(function), (twos,)), compiled=True)
                assert torch.equal(out, function(twos.float()).to(dtype))
    torch._dynamo.reset()


@dataclasses.dataclass(frozen=True)
class Applied:
    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, tensors: passes.Tensors, fields: passes.Tensors, numbers: passes.Numbers) -> torch.Tensor:
        return self.function(tensors[0])
