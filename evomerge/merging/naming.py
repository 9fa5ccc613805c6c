"""Naming: the tensors of a model by the names that its checkpoints have for them.

transformers keeps a table of how checkpoints differ from models in memory: other names, and tensors that are fused,
such as the experts of a layer, cut, transposed or permuted on loading. Merges follow the checkpoint, since a merge of
fused tensors would be another merge. What a checkpoint holds is what `save_pretrained` would write, found out without
data. Most of it is pieces of tensors in memory, which a merge can be written into; the rest is made of several tensors,
and brought back into the model by transformers' own conversion.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from evomerge.errors import InputError
from evomerge.merging.building import empty_model, load_config
from evomerge.merging.sources.tensor_files import Piece
from evomerge.quiet import quiet

Tensors = dict[str, torch.Tensor]
_Target = tuple[str, str | None]
_KEPT = 16  # namings that are made once and kept


class Naming:
    """The names of one model's checkpoints.

    shapes: every tensor of a checkpoint, and `dtypes`. pieces: those that lie in memory as they are. tied: what is left
    out of checkpoints since it is another of their tensors once more, with the name of that.
    """

    def __init__(self, model: Any) -> None:
        """model: on the meta device, as its config makes it."""
        self._model = model
        self.kind: str = model.config.model_type
        self.architecture = type(model).__name__
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ignored = set(model._keys_to_ignore_on_save or ())
        self._held = {name: _blank(tensor) for name, tensor in model.state_dict().items() if name not in ignored}
        stored = _stored(model, self._held)
        forward = _Forward(model, self._held)
        if any(forward.target(name)[0] not in self._held for name in stored):  # what is saved cannot be loaded
            stored = dict(self._held)
        aliases = _aliases(model)
        places = {tensor.untyped_storage()._cdata: name for name, tensor in self._held.items()}
        pieces = {name: piece for name, tensor in stored.items() if (piece := _piece(tensor, places, self._held))}
        whole = {piece.tensor: name for name, piece in pieces.items() if piece.whole}
        self.tied = {whole[alias]: whole[own] for alias, own in aliases.items() if {alias, own} <= whole.keys()}
        left_out = {name for name, piece in pieces.items() if piece.tensor in aliases}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in left_out}
        self.pieces = {name: piece for name, piece in pieces.items() if name in self.shapes}
        self.dtypes = {name: stored[name].dtype for name in self.shapes}
        self.made = [name for name in self.shapes if name not in self.pieces]

    @cached_property
    def merged(self) -> list[str]:
        """The tensors that are merged: parameters, or made of them."""
        return [
            name
            for name, dtype in self.dtypes.items()
            if dtype.is_floating_point and (name not in self.pieces or self.pieces[name].tensor in self._parameters)
        ]

    @property
    def whole(self) -> dict[str, str]:
        """What the tensors that are whole in memory are called there."""
        return {name: piece.tensor for name, piece in self.pieces.items() if piece.whole}

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The tensors with one row per token."""
        ends = []
        for find in (self._model.get_input_embeddings, self._model.get_output_embeddings):
            with suppress(NotImplementedError, AttributeError):
                ends.append(find())
        rows = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        named = {name for name, each in self._model.named_parameters(remove_duplicate=False) if id(each) in rows}
        return frozenset(name for name, tensor in self.whole.items() if tensor in named)

    def kept_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype that each tensor has in a model of `dtype`, which keeps some in float32."""
        from transformers.core_model_loading import build_glob_alternation

        plan = self._model._get_dtype_plan(dtype)
        pattern = build_glob_alternation(list(plan))[0] if plan else None
        in_memory = {name: piece.tensor for name, piece in self.pieces.items()}
        return {
            name: torch.float32 if pattern and pattern.search(in_memory.get(name, name)) else own
            for name, own in self.dtypes.items()
        }

    def tensors(self, model: Any) -> Tensors:
        """A model's tensors by the names of checkpoints: views of its own, and copies of what is made of several, which
        `settle` brings back."""
        held = model.state_dict(keep_vars=True)
        made = self._made(held) if self.made else {}
        return {
            name: self.pieces[name].of(held[self.pieces[name].tensor]) if name in self.pieces else made[name]
            for name in self.shapes
        }

    def weights(self, model: Any) -> Tensors:
        """Those of a model's tensors that are merged (see `tensors`)."""
        tensors = self.tensors(model)
        return {name: tensors[name] for name in self.merged}

    def _made(self, held: Mapping[str, torch.Tensor]) -> Tensors:
        covered = {piece.tensor for piece in self.pieces.values()}
        rest = {name: held[name].detach() for name in self._held if name not in covered}
        return {name: tensor.contiguous() for name, tensor in _stored(self._model, rest, copying=True).items()}

    @torch.no_grad()
    def settle(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Brings those of `tensors` that are no views of the model's into it."""
        held = model.state_dict(keep_vars=True) if self.made else {}
        for name, tensor in self._loaded(tensors) if self.made else ():
            held[name].copy_(tensor)

    def _loaded(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """What transformers makes on loading of the tensors that are no pieces."""
        forward = _Forward(self._model, self._held)
        together: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in forward.ordered(self.made):
            target, pattern = forward.target(name)
            assert pattern is not None  # or else it would be the whole of a tensor
            together[target].append((name, pattern))
        for target, members in together.items():
            converter = forward.converter(members[0][1])
            for name, pattern in members:
                converter.add_tensor(target, name, pattern, tensors[name])
            found = converter.convert(target, model=self._model, config=self._model.config)
            yield from ((name, tensor[0] if isinstance(tensor, list) else tensor) for name, tensor in found.items())

    def read_from(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, Piece | None]]:
        """How the tensors of some checkpoint are called here: for each name the stored one, and which piece of it where
        the checkpoint holds what is fused in memory. Names that mean nothing to transformers stay as they are; what it
        leaves aside on loading is left out.

        shapes: of the checkpoint's tensors.
        """
        if shapes.keys() == self.shapes.keys():
            return {name: (name, None) for name in shapes}
        here = self._targets([*self.shapes, *self.tied])
        found: dict[str, tuple[str, Piece | None]] = {}
        for target, names in self._targets(shapes).items():
            known, fused = here.get(target, []), self._pieces_of(target[0])
            if len(known) == len(names):
                found |= {name: (stored, None) for name, stored in zip(known, names, strict=True)}
            elif fused and not known and len(names) == 1 and shapes[names[0]] == tuple(self._held[target[0]].shape):
                found |= {name: (names[0], piece) for name, piece in fused.items()}
            elif not self._set_aside(target[0]):
                found |= {name: (name, None) for name in names}
        return found

    def _targets(self, names: Iterable[str]) -> dict[_Target, list[str]]:
        """Names by what transformers loads them into, in its order."""
        forward = _Forward(self._model, self._held)
        found: dict[_Target, list[str]] = defaultdict(list)
        for name in forward.ordered(names):
            found[forward.target(name)].append(name)
        return found

    def _pieces_of(self, tensor: str) -> dict[str, Piece]:
        return {name: piece for name, piece in self.pieces.items() if piece.tensor == tensor and not piece.whole}

    def _set_aside(self, name: str) -> bool:
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        return name not in self._held and any(re.search(pattern, name) for pattern in patterns)


class _Forward:
    """What transformers would load a checkpoint's tensors into."""

    def __init__(self, model: Any, held: Mapping[str, torch.Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._held, self._prefix = dict(held), model.base_model_prefix
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]

    def target(self, name: str) -> _Target:
        """The tensor in memory, or the first of those, and the pattern of a conversion that it goes through."""
        from transformers.core_model_loading import rename_source_key

        target = rename_source_key(name, self._renamings, self._converters, self._prefix, self._held)
        if target[0] not in self._held and name in self._held:
            target = rename_source_key(name, [], [], self._prefix, self._held)
        return target

    def converter(self, pattern: str) -> Any:
        return deepcopy(next(each for each in self._converters if pattern in each.source_patterns))

    @staticmethod
    def ordered(names: Iterable[str]) -> list[str]:
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)


class _Uncopied(TorchFunctionMode):
    """Lets `contiguous` return what it is given, so that views stay views."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _stored(model: Any, held: Mapping[str, torch.Tensor], copying: bool = False) -> Tensors:
    """What `save_pretrained` would write of tensors in memory; views of them where possible, unless `copying`."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet(), nullcontext() if copying else _Uncopied():
        found: Tensors = revert_weight_conversion(model, dict(held))
    return found


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _piece(tensor: torch.Tensor, places: Mapping[int, str], held: Mapping[str, torch.Tensor]) -> Piece | None:
    name = places.get(tensor.untyped_storage()._cdata)
    if name is None:
        return None
    whole = tensor.shape == held[name].shape and tensor.stride() == held[name].stride()
    return Piece(name, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), whole)


def _aliases(model: Any) -> dict[str, str]:
    """The parameters that are others once more, as transformers ties them, by name."""
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    tied = set(model.all_tied_weights_keys or ())
    found: dict[str, str] = {}
    for names in same.values():
        own = next((name for name in names if name not in tied), names[0])
        found |= {name: own for name in names if name != own}
    return found


_namings: dict[str, Naming] = {}


def naming_of(config: Any, folder: Path) -> Naming:
    """The naming of a config's model. `folder` opens an error's message."""
    key = json.dumps([type(config).__name__, config.architectures, config.to_json_string(use_diff=False)])
    if key not in _namings:
        with _disable_current_modes():  # a rehearsal is to count what it makes, not this
            found = Naming(empty_model(config, folder))
        while len(_namings) >= _KEPT:
            _namings.pop(next(iter(_namings)))
        _namings[key] = found
    return _namings[key]


def naming_in(folder: Path) -> Naming:
    """The naming of the model in a folder."""
    return naming_of(load_config(folder), folder)


def named_weights(model: Any) -> Tensors:
    """A model's tensors by the names that its checkpoints use, as far as they can be merged."""
    return naming_of(model.config, Path(model.config.name_or_path)).weights(model)


def check_view(folder: Path) -> None:
    """Raises InputError for models whose layers cannot be shared, since their checkpoints' tensors are in pieces or
    permuted in memory."""
    naming = naming_in(folder)
    torn = [name for name in naming.merged if name not in naming.whole]
    if torn:
        raise InputError(
            f"the layers of a {naming.kind} model cannot be put in another order in memory, since its {torn[0]} is "
            "fused with others there; write the checkpoint with `evomerge merge` and use that, or search over merges "
            "of whole models."
        )
