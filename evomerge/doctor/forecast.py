"""How long a search will take on this machine's device, measured in less than a minute."""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from evomerge import devices
from evomerge.candidate import Shard
from evomerge.config.search import SearchConfig
from evomerge.doctor.merges import recipe_of_the_middle
from evomerge.doctor.speeds import bandwidth, from_host, least
from evomerge.evaluation.harness import Harness
from evomerge.layers import layer_index
from evomerge.merging.building import load_config, load_model
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import uniform_field
from evomerge.merging.methods.passes import room_on
from evomerge.merging.plan import make_plan
from evomerge.merging.sources.tensor_files import parameter_count
from evomerge.search.controls import count_controls
from evomerge.search.preparation import Prepared
from evomerge.workers.memory import Placement
from evomerge.workers.worker import base_tokenizer, workers_of_a_node

T = TypeVar("T")
_SMALL = 1_000_000_000  # parameters of a model that is scored whole
_ELEMENTS = 1 << 24  # of the tensor whose merge is timed, at most
_LONG_ENOUGH = 2.0  # seconds of scoring
_SHARDS = 64


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine's device does in a second.

    copies: bytes that move within the device.
    from_host: bytes that are copied to it from the host.
    merges: bytes that a merge by the search's method reads and writes.
    tokens: tokens that a candidate is scored on.
    """

    copies: float
    from_host: float
    merges: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a search will take, where candidates are scored on all search items.

    speeds: what it follows from.
    merge: seconds of a candidate's merge.
    score: seconds of its score on all search items.
    search: seconds of all candidates and controls, over all workers.
    price: of the accelerators in that time; None where nobody asked.
    """

    speeds: Speeds
    merge: float
    score: float
    search: float
    price: float | None

    def parts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def forecast(prepared: Prepared, placement: Placement, hourly: float | None = None) -> Forecast:
    """How long a search will take on this machine's device.

    prepared: the search.
    placement: where its models will live.
    hourly: what an accelerator costs in an hour (on a CPU, what the machine costs), in any currency.
    Raises InputError where the device of the search is not here.
    """
    config = prepared.config
    device = torch.device(devices.resolve_device(config.evaluation.device))
    torch.set_num_threads(config.evaluation.threads)
    tokens, per_token = _scoring(prepared, device)
    speeds = Speeds(bandwidth(device), from_host(device), _merging(prepared, device), 1 / per_token)
    merge = max(placement.moved / speeds.merges, placement.copied / speeds.from_host)
    score, controls = tokens * per_token, count_controls(config)
    workers = workers_of_a_node(config)
    seconds = ((config.limit + controls) * score + (config.budget + controls) * merge) / workers
    cards = workers * (config.workers.num_gpus or 1) if devices.is_accelerator(device) else 1
    return Forecast(speeds, merge, score, seconds, None if hourly is None else seconds / 3600 * cards * hourly)


def _merging(prepared: Prepared, device: torch.device) -> float:
    """Bytes per second of an uncompiled merge of a tensor of a layer, with what candidates share made before."""
    config, kept = prepared.config, dict[Hashable, Any]()
    table = prepared.models.base.weights.table
    plan = make_plan(recipe_of_the_middle(prepared), table)
    layers = [tensor for tensor in plan.tensors if layer_index(tensor.name) is not None]
    merge = max(layers or plan.tensors, key=lambda tensor: math.prod(table[tensor.name].shape))
    shape = [*table[merge.name].shape]
    shape[0] = max(1, min(shape[0], _ELEMENTS // max(1, math.prod(shape[1:]))))
    dtype = getattr(torch, config.evaluation.dtype)
    base, *tuned = (torch.rand(shape, device=device).sub_(0.5).to(dtype) for _ in range(len(merge.models) + 1))

    def once(what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T:
        if (what, models) not in kept:
            kept[what, models] = make()
        result: T = kept[what, models]
        return result

    inputs = Inputs(
        base=base if merge.base is not None else None,
        tensors=tuple(tuned),
        per_model=merge.per_model,
        shared=merge.shared,
        uniforms=lambda index: once(
            "uniforms", (index,), lambda: uniform_field(plan.seed, index, merge.name, base.numel(), device)
        ),
        rescale=plan.rescale,
        once=once,
        drawn=tuple((plan.seed, position) for position in merge.positions),
    )
    out = torch.empty_like(base)
    seconds = least(lambda: plan.method.merge_into(out, inputs, room=room_on(device)), device)
    return (len(tuned) + (merge.base is not None) + 1) * base.nbytes / seconds


def _scoring(prepared: Prepared, device: torch.device) -> tuple[int, float]:
    """The tokens of a candidate, and the seconds that one of them takes: of the base where it is small, else of its
    first layers with made-up weights, from which the time of all layers follows."""
    config, base = prepared.config, prepared.models.base
    if parameter_count(base.weights.table) <= _SMALL:
        return _scored(prepared, load_model(base.folder, getattr(torch, config.evaluation.dtype)).to(device), device)
    layers = load_config(base.folder).get_text_config().num_hidden_layers
    tokens, one = _scored(prepared, _cut(base.folder, 1, config, device), device)
    _, two = _scored(prepared, _cut(base.folder, 2, config, device), device)
    return tokens, one + (layers - 1) * max(0.0, two - one)


def _scored(prepared: Prepared, model: Any, device: torch.device) -> tuple[int, float]:
    """The tokens of a candidate, and the seconds that one of them takes with a model."""
    harness = _harness(prepared, model)
    tokens = harness.tokens("search")
    return tokens.read + tokens.written, _per_token(harness, model, device)


def _harness(prepared: Prepared, model: Any) -> Harness:
    tokenizer = base_tokenizer(prepared.config, prepared.models.base)
    return Harness(prepared.config, model, tokenizer, None, prepared.models.seen, prepared.targets)


def _per_token(harness: Harness, model: Any, device: torch.device) -> float:
    """Seconds for a token, read or written, over as many batches as take long enough; the first time does not count."""
    count = _SHARDS
    while True:
        shard = Shard(0, count)
        seconds = []
        for _ in range(2):
            devices.synchronize([device])
            started = time.perf_counter()
            harness.answers("search", model, shard=shard)
            devices.synchronize([device])
            seconds.append(time.perf_counter() - started)
        tokens = harness.tokens("search", shard)
        if count == 1 or seconds[-1] >= _LONG_ENOUGH / 4:
            return min(seconds) / max(1, tokens.read + tokens.written)
        count = max(1, count // 4)


def _cut(folder: Path, layers: int, config: SearchConfig, device: torch.device) -> Any:
    """A model of the base's shapes with only some layers, and made-up weights."""
    from transformers import AutoModelForCausalLM

    settings = load_config(folder)
    text = settings.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with device:
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.evaluation.dtype))  # type: ignore[no-untyped-call]
    return model.eval()
