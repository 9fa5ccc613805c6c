"""Writes a recipe's merge as a LoRA on one of its models (Hu et al. 2021, arXiv 2106.09685), as PEFT loads it.

A matrix of the merge less that of the base is cut to the best matrix of a rank: the truncated singular value
decomposition (Eckart and Young 1936). Where all models are the base with LoRAs, and the merge adds their products up,
its factors are those of the LoRAs side by side, which lose nothing. What is no matrix, such as a norm or a bias, is
stored whole. So is an embedding that the head is tied to, since a LoRA on it would change one of the two alone.

The fingerprint is that of the base with the adapter merged into it, as `evomerge evaluate BASE+ADAPTER` scores it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.export.card import adapter_card
from evomerge.export.checkpoint import make_ready
from evomerge.export.names import hub_id, public_names
from evomerge.layers import layer_count
from evomerge.merging.sources.adapters import CONFIG, WEIGHTS
from evomerge.merging.sources.models import Model, Models, find_models
from evomerge.merging.sources.weights import RECIPE
from evomerge.recipe import Recipe, single

if TYPE_CHECKING:
    import torch

    from evomerge.merging.plan import MergePlan, TensorMerge
    from evomerge.merging.streamed.merge import StreamedMerge

NOTES = "evomerge_adapter.json"
_PREFIX = "base_model.model."
_DENSE = 1024  # matrices with a shorter side than this are decomposed in full
_SPARE, _PASSES = 16, 6  # of the randomized decomposition of larger ones


@dataclass(frozen=True, slots=True)
class Fitted:
    """How well a matrix was fitted.

    rank: that of its LoRA.
    kept: the share of the squared change that the LoRA has.
    joined: whether its factors are those of the sources, side by side.
    """

    rank: int
    kept: float
    joined: bool


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """What was written.

    base: the model that the adapter changes, by a name that may be shared.
    folder: where that model is.
    fingerprint: that of the base with the adapter merged into it, 16 hexadecimal digits.
    merged: that of the merge itself.
    checked: whether the recipe recorded the merge's fingerprint.
    kept: the share of the squared change of all tensors that the adapter has.
    matrices: how well each matrix was fitted, by name.
    whole: the names of the tensors that are stored whole.
    """

    base: str
    folder: str
    fingerprint: str
    merged: str
    checked: bool
    kept: float
    matrices: Mapping[str, Fitted]
    whole: Sequence[str]

    @property
    def kinds(self) -> list[tuple[str, int, int, float]]:
        """For the matrices of a name in all layers: the name, their number, the largest rank, the least share kept."""
        kinds: dict[str, list[Fitted]] = {}
        for name, fitted in self.matrices.items():
            kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(fitted)
        return [
            (kind, len(found), max(each.rank for each in found), min(each.kept for each in found))
            for kind, found in kinds.items()
        ]


def write_adapter(
    recipe: Recipe,
    out: Path,
    where: str,
    rank: int,
    device: str = "cpu",
    *,
    base: str | None = None,
    card: bool = True,
    statistics: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> WrittenAdapter:
    """Writes a recipe's merge as an adapter.

    recipe: the merge's.
    out: the folder to write; it must not hold anything yet.
    where: the recipe's file, for messages.
    rank: the largest rank of a matrix.
    device: where the merge is computed.
    base: the model that the adapter changes; by default the recipe's base.
    card: whether a model card is written too.
    statistics: a folder of statistics, for methods that need some (`checkpoint.merge`).
    warn: is told what the user should know.
    Raises InputError for what no adapter can say, and WorkFailed, leaving nothing, where the recipe records another
    fingerprint than the merge has.
    """
    from evomerge.merging.streamed.shards import check_writable, staged

    if rank < 1:
        raise InputError(f"--lora-rank is {rank}; use a rank of at least 1.")
    check_writable(out)
    ready = make_ready(recipe, where, device, statistics, warn)
    own = _base_of(ready.recipe, ready.models, base, where)
    _check_shape(ready.recipe, ready.merge.plan, own, where)
    for warning in ready.verdict.warnings:
        warn(warning)
    tried: list[_Adapter] = []

    def attempt(merge: "StreamedMerge") -> str:
        tried.append(_Adapter(own, merge.plan, ready.models, rank, where))
        return tried[-1].take_all(merge.merged())

    fingerprint, checked = ready.write(attempt)
    made = tried[-1]
    if not made.matrices:
        raise InputError(f"{where}: the merge changes no matrix of {own.reference}, so there is no LoRA to write.")
    name = public_names(ready.recipe).get(own.reference, own.folder.name)
    with staged(out) as folder:
        made.save(folder, *_shared_name(name, own.folder))
        with_it = _fingerprint_with(own, folder, ready.dtype, where)
        written = WrittenAdapter(
            name, str(own.folder), with_it, fingerprint, checked, made.kept, made.matrices, sorted(made.whole)
        )
        kept = ready.noted(fingerprint)
        (folder / RECIPE).write_text(kept.to_yaml(), encoding="utf-8")
        (folder / NOTES).write_text(json.dumps(_noted(written), indent=2) + "\n", encoding="utf-8")
        if card:
            text = adapter_card(kept, name, written.fingerprint, written.kinds, ready.verdict)
            (folder / "README.md").write_text(text, encoding="utf-8")
    return written


def _base_of(recipe: Recipe, models: Models, base: str | None, where: str) -> Model:
    """The model that the adapter changes. Raises InputError where there is none, or where it has an adapter itself."""
    reference = base or recipe.base_model
    if reference is None:
        raise InputError(
            f"{where}: the recipe has no base_model, so say which model the adapter changes (--lora-base MODEL)."
        )
    own = models[reference] if reference in models else find_models(reference, [reference]).base
    if own.source.adapter is not None:
        raise InputError(f"{where}: {reference} has an adapter itself; name a whole model with --lora-base.")
    return own


def _check_shape(recipe: Recipe, plan: "MergePlan", base: Model, where: str) -> None:
    """Raises InputError for a merge that is no changed base."""
    if not plan.keeps_layers or len(plan.layers) != layer_count(base.table):
        raise InputError(
            f"{where}: the merge has other layers than {base.reference}, and an adapter cannot say that; leave out "
            "--lora-rank."
        )
    if recipe.vocabulary is not None:
        raise InputError(
            f"{where}: the merge has a tokenizer of its own, and an adapter cannot say that; leave out --lora-rank."
        )


class _Modules:
    """The modules of a base in memory, and how PEFT changes their tensors."""

    def __init__(self, base: Model) -> None:
        """base: the model."""
        from evomerge.merging.building import empty_model, load_config
        from evomerge.merging.naming import naming_of

        config = load_config(base.folder)
        naming = naming_of(config, base.folder)
        self._by_name = dict(empty_model(config, base.folder).named_modules())
        self._held, self._ends = naming.whole, {end: {*pair} for pair in naming.tied.items() for end in pair}

    def find(self, name: str) -> tuple[str, str] | None:
        """The module of a tensor, and the tensor's name in it; None for a part of a larger tensor in memory.

        name: of a tensor in a checkpoint.
        """
        if name not in self._held:
            return None
        module, _, kind = self._held[name].rpartition(".")
        return module, kind

    def takes_lora(self, name: str) -> bool:
        """Whether a tensor can have a LoRA. An embedding that a head is tied to cannot: it would change one alone."""
        import torch
        from transformers.pytorch_utils import Conv1D

        found = self.find(name)
        kinds = (torch.nn.Embedding, torch.nn.Linear, Conv1D)
        return found is not None and found[1] == "weight" and name not in self._ends and self._is(found[0], kinds)

    def takes_bias(self, module: str) -> bool:
        """Whether a module is a layer with a weight that can have a LoRA, so that its bias is stored beside that."""
        import torch
        from transformers.pytorch_utils import Conv1D

        return self._is(module, (torch.nn.Linear, Conv1D))

    def keys(self, name: str, b: "torch.Tensor", a: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The factors of a tensor's LoRA by the names that PEFT has for them.

        name: of a tensor that takes one.
        b: the factor with the tensor's rows, shape (rows, rank).
        a: the one with its columns, shape (rank, columns).
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        module = f"{_PREFIX}{(self.find(name) or ('', ''))[0]}"
        owner = self._by_name[module.removeprefix(_PREFIX)]
        if isinstance(owner, torch.nn.Embedding):  # its rows are its inputs
            return {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        if isinstance(owner, Conv1D):
            return {f"{module}.lora_A.weight": b.T, f"{module}.lora_B.weight": a.T}
        return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}

    def saved_whole(self, module: str) -> list[str]:
        """The modules that PEFT stores with a module that it stores whole: both, where a head is tied to an embedding.

        Raises LookupError for a module with others in it, which PEFT cannot store.
        """
        if any(True for _ in self._by_name[module].children()):
            raise LookupError(module)
        name = next((own for own, held in self._held.items() if held == f"{module}.weight"), None)
        ends = self._ends.get(name or "", ())
        return sorted(self._held.get(end, end).rpartition(".")[0] for end in ends) or [module]

    def named(self, modules: Sequence[str]) -> list[str]:
        """Modules as PEFT's config names them: by their last word where that means no other module."""
        by_end: dict[str, set[str]] = {}
        for module in self._by_name:
            by_end.setdefault(module.rpartition(".")[2], set()).add(module)
        chosen = set(modules)
        ends = {module.rpartition(".")[2] for module in chosen}
        short = {end for end in ends if by_end[end] <= chosen}
        return sorted(short | {module for module in chosen if module.rpartition(".")[2] not in short})

    @property
    def ends(self) -> set[str]:
        """The modules whose weight is shared: an embedding and the head that is tied to it."""
        return {self._held.get(end, end).rpartition(".")[0] for end in self._ends}

    @property
    def transposed(self) -> bool:
        """Whether layers store their weights as (in, out)."""
        from transformers.pytorch_utils import Conv1D

        return any(isinstance(module, Conv1D) for module in self._by_name.values())

    def _is(self, module: str, kinds: tuple[type, ...]) -> bool:
        return isinstance(self._by_name[module], kinds)


class _Adapter:
    """An adapter that is being made.

    matrices: how well each matrix was fitted, by its name.
    whole: the names of the tensors that are stored whole.
    """

    def __init__(self, base: Model, plan: "MergePlan", models: Models, rank: int, where: str) -> None:
        """base: the model that it changes.
        plan: how the merge is made.
        models: those of the merge.
        rank: the largest rank of a matrix.
        where: what the recipe is called, which opens an error's message.
        """
        self._base, self._models, self._rank, self._where = base, models, rank, where
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self._method = plan.method.name
        self._modules = _Modules(base)
        self._tensors: dict[str, torch.Tensor] = {}
        self._vectors: dict[str, torch.Tensor] = {}  # every tensor of one dimension
        self._whole_modules: set[str] = set()
        self._all_biases = False
        self._square = self._lost = 0.0  # of all changes together
        self.matrices: dict[str, Fitted] = {}
        self.whole: list[str] = []

    @property
    def kept(self) -> float:
        """The share of the squared change of all tensors that the adapter has; 1 where nothing changes."""
        return 1.0 - self._lost / self._square if self._square else 1.0

    def take_all(self, merged: "Iterable[tuple[str, torch.Tensor]]") -> str:
        """Takes every tensor of a merge, and returns the merge's fingerprint.

        merged: its tensors by name.
        Raises InputError for one that no adapter can change.
        """
        from evomerge.merging.methods.kernels import checksum, fingerprint_of

        def checksums() -> Iterator[int]:
            for name, tensor in merged:
                yield int(checksum(tensor, name))
                self._take(name, tensor)

        return fingerprint_of(checksums())

    def _take(self, name: str, merged: "torch.Tensor") -> None:
        weights = self._base.weights
        info = weights.table.get(name)
        if info is None or info.shape != tuple(merged.shape):
            raise self._refusal(f"{self._base.reference} has no {name} of the merge's shape")
        merged = merged.cpu()
        change = merged.double() - weights.read(name).to(merged.dtype).double()
        weights.close()
        if merged.dim() == 1:
            self._vectors[name] = merged
        square = float(change.square().sum())
        if not square:
            return
        self._square += square
        if self._modules.takes_lora(name):
            self._fit(name, change, square)
        else:
            self._keep(name, merged)

    def _fit(self, name: str, change: "torch.Tensor", square: float) -> None:
        joined = self._side_by_side(self._planned[name])
        factors = truncated(change, self._rank) if joined is None else joined
        b, a = (factor.float().contiguous() for factor in factors)
        lost = float((change - b.double() @ a.double()).square().sum())
        self._lost += lost
        self.matrices[name] = Fitted(a.shape[0], 1.0 - lost / square, joined is not None)
        self._tensors |= self._modules.keys(name, b, a)

    def _keep(self, name: str, merged: "torch.Tensor") -> None:
        found = self._modules.find(name)
        if found is None:
            raise self._refusal(f"{name} is a part of a larger tensor in memory")
        module, kind = found
        self.whole.append(name)
        if kind == "bias" and self._modules.takes_bias(module):
            self._all_biases = True
            return
        try:
            modules = self._modules.saved_whole(module)
        except LookupError:
            raise self._refusal(f"{name} belongs to a module that has others in it") from None
        self._whole_modules |= {*modules}
        self._tensors |= {f"{_PREFIX}{own}.{kind}": merged for own in modules}

    def _side_by_side(self, planned: "TensorMerge") -> "tuple[torch.Tensor, torch.Tensor] | None":
        """The factors of the sources' LoRAs next to each other, as (rows, rank) and (rank, columns). None where they do
        not make the merge, or have too large a rank."""
        import torch

        shares = added_up(self._method, planned)
        if shares is None:
            return None
        left, right = [], []
        for model, source, share in zip(planned.models, planned.sources, shares, strict=True):
            own = self._models[model]
            if model == self._base.reference:
                continue
            if own.folder != self._base.folder or own.source.adapter is None:
                return None
            changes = own.weights.products(source)
            if own.weights.changes(source) and not changes:
                return None
            for change in changes:
                factors = change.factors(own.weights.read_stored)
                left.append(factors.left.double() * factors.scale * share)
                right.append(factors.right.double())
        if not left or sum(factor.shape[1] for factor in left) > self._rank:
            return None
        return torch.cat(left, dim=1), torch.cat(right, dim=0)

    def save(self, folder: Path, base: str, revision: str | None) -> None:
        """Writes the adapter's weights and config.

        folder: an empty folder.
        base: what the config calls the base.
        revision: that of the base on the hub; None for any.
        """
        from peft import LoraConfig
        from safetensors.torch import save_file

        tensors = {name: tensor.clone().contiguous() for name, tensor in {**self._tensors, **self._rest()}.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        fitted = {(self._modules.find(name) or ("", ""))[0]: matrix.rank for name, matrix in self.matrices.items()}
        rank = max(fitted.values(), default=1)
        ranks = {re.escape(module): own for module, own in sorted(fitted.items()) if own != rank}
        config: Any = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            revision=revision,
            r=rank,
            lora_alpha=rank,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=self._modules.named(sorted(fitted)),
            modules_to_save=self._modules.named(sorted(self._whole_modules)) or None,
            bias="all" if self._all_biases else "none",
            fan_in_fan_out=self._modules.transposed,
            ensure_weight_tying=len(self._whole_modules & self._modules.ends) > 1,
            inference_mode=True,
        )
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _rest(self) -> "dict[str, torch.Tensor]":
        """The other tensors of modules that are stored whole, and with them all biases where PEFT stores all."""
        changed = {(self._modules.find(name) or ("", ""))[0] for name in self.matrices}
        rest = {}
        for name, tensor in self._vectors.items():
            found = self._modules.find(name)
            if found is None:
                continue
            module, kind = found
            if module in self._whole_modules:
                rest[f"{_PREFIX}{module}.{kind}"] = tensor
            elif kind == "bias" and self._all_biases:
                rest[f"{_PREFIX}{module}.{'base_layer.' if module in changed else ''}{kind}"] = tensor
        return rest

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"{self._where}: {reason}, and a LoRA cannot change that; leave out --lora-rank.")


def added_up(method: str, planned: "TensorMerge") -> list[float] | None:
    """The factor of each model's change of the base, where a merge adds these up; None where it does something else.

    method: the name of the merge method.
    planned: how the tensor is made.
    """
    from evomerge.merging.methods.kernels import divisor

    if method not in ("linear", "task_arithmetic"):
        return None
    weights = [float(parameters["weight"]) for parameters in planned.per_model]
    by = divisor(sum(weights)) if planned.shared["normalize"] else 1.0
    if method == "task_arithmetic":
        return [weight / by * float(planned.shared["lambda"]) for weight in weights]
    shares = [weight / by for weight in weights]
    return shares if math.isclose(sum(shares), 1.0, rel_tol=1e-12) else None


def truncated(matrix: "torch.Tensor", rank: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The best factors of a matrix, as (rows, rank) and (rank, columns); their sizes are alike.

    Large matrices are decomposed by random projections (Halko et al. 2011, algorithm 5.1), with torch's
    `svd_lowrank` from a fixed seed, so that the same matrix has the same factors.

    matrix: of two dimensions, in float64.
    rank: the largest rank.
    """
    import torch

    if min(matrix.shape) <= _DENSE:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + _SPARE, *matrix.shape), niter=_PASSES)
        vt = v.T
    nonzero = int((s > s[0] * torch.finfo(matrix.dtype).eps).sum())
    own = max(1, min(rank, nonzero))
    root = s[:own].sqrt()
    return u[:, :own] * root, root.unsqueeze(1) * vt[:own]


def _fingerprint_with(base: Model, adapter: Path, dtype: str, where: str) -> str:
    """The fingerprint of a base with an adapter merged into it, 16 hexadecimal digits."""
    from evomerge.merging.methods.kernels import checksum, fingerprint_of
    from evomerge.merging.streamed.merge import StreamedMerge

    reference = f"{base.folder}+{adapter}"
    models = find_models(reference, [reference])
    merge = StreamedMerge(single(reference), models, where, "cpu", dtype)
    return fingerprint_of(int(checksum(tensor, name)) for name, tensor in merge.merged())


def _shared_name(reference: str, folder: Path) -> tuple[str, str | None]:
    """What an adapter's config calls its base, and the revision: a hub id where it has one, else its folder."""
    own = hub_id(reference)
    return (str(folder), None) if own is None else (own, reference.partition("@")[2] or None)


def _noted(written: WrittenAdapter) -> dict[str, Any]:
    """What the file beside the adapter says, without paths."""
    return {name: value for name, value in asdict(written).items() if name != "folder"}
