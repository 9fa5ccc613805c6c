"""Adapter: a LoRA (Hu et al. 2021, arXiv 2106.09685) in a PEFT folder, merged into tensors as they are read.

A changed weight is W + scale * B A, computed so that its bits are the same everywhere (`factors`), and rounded into the
dtype that W is stored in. The result is that of PEFT's `merge_and_unload` on a model that was loaded in this dtype, up
to the last place. The scale is alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).
Tensors that the adapter stores whole (`modules_to_save`, trained biases) replace the base's.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from evomerge.errors import InputError, choices
from evomerge.merging.sources.tensor_files import FLOATS, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

    from evomerge.merging.sources.factors import Factors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# keys of variants of LoRA that have another formula for the merge, or that were trained on a changed base
REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
Read = Callable[[TensorInfo], "torch.Tensor"]
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.(weight|bias))?")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression ({error})") from None
    return pattern


_Pattern = Annotated[str, AfterValidator(_compiles)]
_Rank = Annotated[int, Field(gt=0)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]


class _Config(BaseModel):
    """The keys of adapter_config.json that a LoRA's merge depends on; PEFT writes many more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    use_rslora: bool = False
    ensure_weight_tying: bool = False
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """The rank of a module's LoRA."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """The factor of a module's LoRA."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches a module's name or an end of it, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one weight: scale * B A.

    a: the matrix A, shape (rank, in).
    b: the matrix B, shape (out, rank).
    scale: the factor of the product.
    transposed: whether the weight is stored as (in, out), so that the product has to be transposed.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    def factors(self, read: Read) -> "Factors":
        """The matrices in the order in which the weight is stored.

        read: reads a tensor of the adapter.
        """
        from evomerge.merging.sources.factors import Factors

        a, b = read(self.a), read(self.b)
        return Factors(a.T, b.T, self.scale) if self.transposed else Factors(b, a, self.scale)


@dataclass(frozen=True, slots=True)
class Shift:
    """What is added to one bias (`lora_bias`): scale * vector.

    vector: in the shape of the bias.
    scale: its factor.
    """

    vector: TensorInfo
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter does to each tensor of its base, by the tensor's name.

    replaced: tensors that it stores whole.
    low_rank: what it adds to weights.
    shifts: what it adds to biases.
    head: the name of the head that it unties from the base's embedding; None where it unties none.
    """

    replaced: Mapping[str, TensorInfo]
    low_rank: Mapping[str, tuple[LowRank, ...]]
    shifts: Mapping[str, Shift]
    head: str | None = None

    def changes(self, name: str) -> bool:
        """Whether the adapter changes the tensor of that name."""
        return name in self.replaced or name in self.low_rank or name in self.shifts

    def stored(self, name: str) -> TensorInfo | None:
        """The tensor that the adapter stores in the place of the one of that name and does not change again; None where
        there is none."""
        return None if name in self.low_rank or name in self.shifts else self.replaced.get(name)

    def products(self, name: str) -> tuple[LowRank, ...]:
        """All that the adapter does to the tensor of that name, if it only adds products to it; otherwise nothing."""
        return () if name in self.replaced or name in self.shifts else self.low_rank.get(name, ())

    def adapt(self, name: str, tensor: "torch.Tensor", read: Read, exact: bool = True) -> "torch.Tensor":
        """One tensor of the base with the adapter merged in, in the tensor's dtype.

        name: the tensor's name.
        tensor: its values in the base.
        read: reads a tensor of the adapter.
        exact: whether products have the same bits everywhere. Versions up to 0.2.0 left the order of their sums to
            torch.
        """
        if name in self.replaced:
            tensor = read(self.replaced[name])
        changes = self.low_rank.get(name, ())
        tensor = _with_exact(tensor, changes, read) if exact else _with_float32(tensor, changes, read)
        if name in self.shifts:
            shift = self.shifts[name]
            tensor = (tensor.float() + read(shift.vector).float() * shift.scale).to(tensor.dtype)
        return tensor

    def adapt_table(self, table: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The table of a base, with dtypes and shapes of the tensors that the adapter replaces."""
        return {
            name: replace(info, dtype=self.replaced[name].dtype, shape=self.replaced[name].shape)
            if name in self.replaced
            else info
            for name, info in table.items()
        }


def _with_exact(tensor: "torch.Tensor", changes: tuple[LowRank, ...], read: Read) -> "torch.Tensor":
    from evomerge.merging.methods.parts import whole_of
    from evomerge.merging.sources.factors import Factored

    return whole_of(Factored(tensor, [change.factors(read) for change in changes])) if changes else tensor


def _with_float32(tensor: "torch.Tensor", changes: tuple[LowRank, ...], read: Read) -> "torch.Tensor":
    for change in changes:
        delta = (read(change.b).float() @ read(change.a).float()) * change.scale
        tensor = (tensor.float() + (delta.T if change.transposed else delta)).to(tensor.dtype)
    return tensor


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).exists() and not any(folder.glob("model*.safetensors*"))


def load_adapter(
    folder: Path,
    table: Mapping[str, TensorInfo],
    renamed: Mapping[str, str],
    turned: bool,
    tied: tuple[str, str] | None = None,
) -> Adapter:
    """An adapter that fits the tensors of a base. Its config and header are read, but no weights.

    folder: the adapter's folder.
    table: the base's tensors by name.
    renamed: the base's names of tensors that have another name in memory, by the name in memory.
    turned: whether the base stores square weights as (in, out). `fan_in_fan_out` does not decide this, since PEFT goes
        by the layer, too.
    tied: the base's head and the embedding that it is tied to; None where the base does not tie them.
    Raises InputError, with the key or the tensor, for what cannot be merged.
    """
    config = _read_config(folder)
    if tied is None:
        return _Fitting(folder, config, table, renamed, turned).adapter()
    head, embedding = tied
    return _Fitting(folder, config, {**table, head: table[embedding]}, renamed, turned).tied_adapter(head, embedding)


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        _check_type(path, document)
        config = _Config.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise InputError(f"{path}: {key}: {first['msg']}; expected the config of a LoRA as PEFT saves it.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); repair or download it again.") from None
    for key in REFUSED:
        if document.get(key):
            raise InputError(
                f"{path}: {key} is set, and such an adapter cannot be merged on reading; merge it into its base with "
                "PEFT and name the result."
            )
    start = document.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {start}, which changes the base as well; convert the adapter to a plain "
            "LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    return config


def _check_type(path: Path, document: Any) -> None:
    """Raises InputError for other kinds of adapters, before a key of a LoRA would be reported as missing."""
    kind = document.get("peft_type", "LORA") if isinstance(document, dict) else "LORA"
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {kind}; only LORA can be merged on reading, so merge this adapter into "
            "its base with PEFT, where PEFT can, and name the result."
        )


@dataclass(frozen=True, slots=True)
class _Fitting:
    """An adapter that is being fitted to the tensors of a base; the fields are those of `load_adapter`."""

    folder: Path
    config: _Config
    table: Mapping[str, TensorInfo]
    renamed: Mapping[str, str]
    turned: bool

    def adapter(self) -> Adapter:
        if not (self.folder / WEIGHTS).exists():
            if (self.folder / PICKLE).exists():
                raise InputError(
                    f"{self.folder}: the adapter is pickled ({PICKLE}), and a pickle can run code when it is opened; "
                    "save it as safetensors with PEFT first."
                )
            raise InputError(f"{self.folder}: holds no {WEIGHTS}; expected a LoRA as PEFT saves it.")
        replaced: dict[str, TensorInfo] = {}
        matrices: dict[str, dict[str, TensorInfo]] = {}
        for key, info in read_header(self.folder / WEIGHTS).items():
            if info.dtype not in FLOATS:
                raise InputError(
                    f"{self.folder}: {key} is stored as {info.dtype}; only floating-point weights can be merged."
                )
            name = key.removeprefix("base_model.model.")
            match = _KEY.fullmatch(name)
            if match:
                module, matrix, kind = match.groups()
                matrices.setdefault(module, {})[f"{matrix}.bias" if kind == "bias" else matrix] = info
            else:
                plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                replaced[self._target(plain, key)] = info
        low_rank = {
            self._target(f"{module}.weight", module): (self._low_rank(module, own),) for module, own in matrices.items()
        }
        shifts = {
            self._target(f"{module}.bias", module): self._shift(module, own["lora_B.bias"])
            for module, own in matrices.items()
            if "lora_B.bias" in own
        }
        return Adapter(replaced, low_rank, shifts)

    def tied_adapter(self, head: str, embedding: str) -> Adapter:
        """The adapter of a base that ties its head to its embedding, as PEFT merges it.

        Where one of the two was trained whole, without the other, they differ from then on. A LoRA on either, or on
        both, is added to the tensor that they share. Where PEFT tied what it trained, it stored the result twice.

        head: the name of the head.
        embedding: the name of the embedding.
        """
        fitted = self.adapter()
        trained = any(self._trained_whole(name, fitted) for name in (head, embedding))
        as_one = self.config.ensure_weight_tying and {head, embedding} <= fitted.replaced.keys()
        if trained and not as_one:
            return replace(fitted, head=head)
        whole = {embedding if name == head else name: info for name, info in sorted(fitted.replaced.items())}
        low_rank = {name: changes for name, changes in fitted.low_rank.items() if name != head}
        if head in fitted.low_rank:
            low_rank[embedding] = low_rank.get(embedding, ()) + fitted.low_rank[head]
        return Adapter(whole, low_rank, fitted.shifts)

    def _trained_whole(self, name: str, fitted: Adapter) -> bool:
        """Whether a tensor was trained whole; PEFT may also store embeddings that were not trained."""
        modules = tuple(self.config.modules_to_save or ())
        return name in fitted.replaced and name.removesuffix(".weight").endswith(modules)

    def _target(self, name: str, key: str) -> str:
        """The base's name for a tensor of the adapter. An adapter that was tuned without the model's head has names
        that lack the prefix of the base's."""
        name = self.renamed.get(name, name)
        if name in self.table:
            return name
        ends = [tensor for tensor in self.table if tensor.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0]
        raise InputError(f"{self.folder}: {key} fits no tensor of the base{self._origin}; {choices(name, self.table)}.")

    def _low_rank(self, module: str, matrices: Mapping[str, TensorInfo]) -> LowRank:
        embedding = "lora_embedding_A" in matrices
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for name in names:
            if name not in matrices:
                raise InputError(f"{self.folder}: {module} lacks {name}; save the adapter again with PEFT.")
        a, b = (matrices[name] for name in names)
        target = self._target(f"{module}.weight", module)
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise InputError(f"{self.folder}: {module} is no linear layer or embedding; only these can be merged.")
        rank = self.config.rank(module)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise InputError(
                f"{self.folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG} says "
                f"rank {rank} (r, rank_pattern); download the adapter again."
            )
        straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        shape = self.table[target].shape
        if shape not in (straight, turned):
            raise InputError(
                f"{self.folder}: {module} changes a weight of shape {list(straight)}, but {target} of the base has "
                f"{list(shape)}{self._origin}; name the base that it was tuned from."
            )
        transposed = shape != straight if straight != turned else embedding or self.turned
        return LowRank(a, b, self.config.scale(module), transposed)

    def _shift(self, module: str, vector: TensorInfo) -> Shift:
        target = self._target(f"{module}.bias", module)
        if vector.shape != self.table[target].shape:
            raise InputError(
                f"{self.folder}: {module} changes a bias of shape {list(vector.shape)}, but {target} of the base has "
                f"{list(self.table[target].shape)}{self._origin}; name the base that it was tuned from."
            )
        return Shift(vector, self.config.scale(module))

    @property
    def _origin(self) -> str:
        made_for = self.config.base_model_name_or_path
        return f" (the adapter was made for {made_for})" if made_for else ""
