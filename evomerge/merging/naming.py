"""Naming: the tensors of a model by the names that its checkpoints have for them.

transformers keeps a table of how checkpoints differ from models in memory. Tensors have other names there, and some
are fused (such as the experts of a layer), cut, transposed or permuted on loading. Merges follow the checkpoint, since
a merge of fused tensors would have other weights.

A checkpoint holds what `save_pretrained` would write, which is worked out on the meta device, without data. Most of its
tensors are pieces of tensors in memory, and a merge is written straight into a piece. The other tensors are made of
several tensors in memory; transformers' own conversion brings their merges back into the model.
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

    kind: the model type, as in `llama`.
    architecture: the name of the model's class.
    shapes: the shape of every tensor of a checkpoint, by name.
    dtypes: its dtype, by name.
    pieces: where a tensor lies in memory, by name, for those that are pieces of one tensor in memory.
    made: the names of the others, which are made of several tensors in memory.
    tied: tensors that checkpoints leave out, with the name of the tensor that they are tied to.
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
        """The names of the tensors that are merged: parameters, and what is made of parameters."""
        return [
            name
            for name, dtype in self.dtypes.items()
            if dtype.is_floating_point and (name not in self.pieces or self.pieces[name].tensor in self._parameters)
        ]

    @property
    def whole(self) -> dict[str, str]:
        """The names in memory of the tensors that are the whole of a tensor there, by their names in checkpoints."""
        return {name: piece.tensor for name, piece in self.pieces.items() if piece.whole}

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The names of the tensors with one row per token."""
        ends = []
        for find in (self._model.get_input_embeddings, self._model.get_output_embeddings):
            with suppress(NotImplementedError, AttributeError):
                ends.append(find())
        rows = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        named = {name for name, own in self._model.named_parameters(remove_duplicate=False) if id(own) in rows}
        return frozenset(name for name, tensor in self.whole.items() if tensor in named)

    def kept_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of each tensor, by name, in a model that is loaded in `dtype`: some tensors stay in float32."""
        from transformers.core_model_loading import build_glob_alternation

        plan = self._model._get_dtype_plan(dtype)
        pattern = build_glob_alternation(list(plan))[0] if plan else None
        in_memory = {name: piece.tensor for name, piece in self.pieces.items()}
        return {
            name: torch.float32 if pattern and pattern.search(in_memory.get(name, name)) else own
            for name, own in self.dtypes.items()
        }

    def tensors(self, model: Any) -> Tensors:
        """A model's tensors by the names of checkpoints.

        A piece of a tensor in memory is a view. A tensor that is made of several is a copy, which `settle` brings back.

        model: a model of this naming's config.
        """
        held = model.state_dict(keep_vars=True)
        made = self.made_of(held) if self.made else {}
        return {
            name: self.pieces[name].of(held[self.pieces[name].tensor]) if name in self.pieces else made[name]
            for name in self.shapes
        }

    def weights(self, model: Any) -> Tensors:
        """The tensors of a model that are merged, by the names of checkpoints (see `tensors`)."""
        tensors = self.tensors(model)
        return {name: tensors[name] for name in self.merged}

    def made_of(self, held: Mapping[str, torch.Tensor]) -> Tensors:
        """The tensors that are made of several tensors in memory, given those. Gradients are made of gradients in the
        same way, since transformers only cuts, joins and permutes.

        held: tensors by their names in memory; those of which nothing is made may be missing.
        """
        covered = {piece.tensor for piece in self.pieces.values()}
        rest = {name: held[name].detach() for name in self._held if name not in covered and name in held}
        return {name: tensor.contiguous() for name, tensor in _stored(self._model, rest, copying=True).items()}

    @torch.no_grad()
    def settle(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Brings changed tensors into a model, as far as they are copies and not views of its memory.

        model: a model of this naming's config.
        tensors: what `tensors` or `weights` returned for the model.
        """
        held = model.state_dict(keep_vars=True) if self.made else {}
        for name, tensor in self._loaded(tensors) if self.made else ():
            held[name].copy_(tensor)

    def _loaded(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The names and values in memory that transformers makes of the tensors that are no pieces."""
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
            converted = converter.convert(target, model=self._model, config=self._model.config)
            for name, tensor in converted.items():
                yield name, tensor[0] if isinstance(tensor, list) else tensor

    def read_from(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, Piece | None]]:
        """How to read a checkpoint whose names may be older ones: for each name of this naming, the stored name, and
        the piece of the stored tensor where the checkpoint holds a tensor that is fused.

        Names that transformers does not know stay as they are. Tensors that it ignores on loading are left out.

        shapes: the shapes of the checkpoint's tensors, by stored name.
        """
        if shapes.keys() == self.shapes.keys():
            return {name: (name, None) for name in shapes}
        here = self._targets([*self.shapes, *self.tied])
        sources: dict[str, tuple[str, Piece | None]] = {}
        for target, names in self._targets(shapes).items():
            own, fused = here.get(target, []), self._pieces_of(target[0])
            if len(own) == len(names):
                sources |= {name: (stored, None) for name, stored in zip(own, names, strict=True)}
            elif fused and not own and len(names) == 1 and shapes[names[0]] == tuple(self._held[target[0]].shape):
                sources |= {name: (names[0], piece) for name, piece in fused.items()}
            elif not self._set_aside(target[0]):
                sources |= {name: (name, None) for name in names}
        return sources

    def _targets(self, names: Iterable[str]) -> dict[_Target, list[str]]:
        """Checkpoint names by the tensor that transformers loads them into, in its order."""
        forward = _Forward(self._model, self._held)
        by_target: dict[_Target, list[str]] = defaultdict(list)
        for name in forward.ordered(names):
            by_target[forward.target(name)].append(name)
        return by_target

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
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]

    def target(self, name: str) -> _Target:
        """The name of the tensor in memory (the first, where there are several), and the pattern of its conversion;
        None where it needs none."""
        from transformers.core_model_loading import rename_source_key

        target = rename_source_key(name, self._renamings, self._converters, self._prefix, self._held)
        if target[0] not in self._held and name in self._held:
            target = rename_source_key(name, [], [], self._prefix, self._held)
        return target

    def converter(self, pattern: str) -> Any:
        """A new copy of the conversion that has a pattern."""
        return deepcopy(next(rule for rule in self._converters if pattern in rule.source_patterns))

    @staticmethod
    def ordered(names: Iterable[str]) -> list[str]:
        """Names in the order in which transformers loads them."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)


class _Uncopied(TorchFunctionMode):
    """Lets `contiguous` return what it is given, so that views stay views."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _stored(model: Any, held: Mapping[str, torch.Tensor], copying: bool = False) -> Tensors:
    """What `save_pretrained` would write of tensors in memory, by name: views where possible, or copies with
    `copying`."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet(), nullcontext() if copying else _Uncopied():
        stored: Tensors = revert_weight_conversion(model, dict(held))
    return stored


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _piece(tensor: torch.Tensor, places: Mapping[int, str], held: Mapping[str, torch.Tensor]) -> Piece | None:
    name = places.get(tensor.untyped_storage()._cdata)
    if name is None:
        return None
    whole = tensor.shape == held[name].shape and tensor.stride() == held[name].stride()
    return Piece(name, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), whole)


def _aliases(model: Any) -> dict[str, str]:
    """The names of parameters that are tied to another one, each with the name of the other."""
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    tied = set(model.all_tied_weights_keys or ())
    aliases: dict[str, str] = {}
    for names in same.values():
        own = next((name for name in names if name not in tied), names[0])
        aliases |= {name: own for name in names if name != own}
    return aliases


_namings: dict[str, Naming] = {}


def naming_of(config: Any, folder: Path) -> Naming:
    """The naming of a config's model, made once and kept.

    config: a transformers config.
    folder: the model's folder, which opens an error's message.
    Raises InputError where transformers cannot build the model.
    """
    key = json.dumps([type(config).__name__, config.architectures, config.to_json_string(use_diff=False)])
    if key not in _namings:
        with _disable_current_modes():  # a rehearsal counts the tensors that a merge makes, not those of this model
            made = Naming(empty_model(config, folder))
        while len(_namings) >= _KEPT:
            _namings.pop(next(iter(_namings)))
        _namings[key] = made
    return _namings[key]


def naming_in(folder: Path) -> Naming:
    """The naming of the model in a folder. Raises InputError where transformers cannot build it."""
    return naming_of(load_config(folder), folder)


def named_weights(model: Any) -> Tensors:
    """The tensors of a model that are merged, by the names that its checkpoints use."""
    return naming_of(model.config, Path(model.config.name_or_path)).weights(model)


def check_view(folder: Path) -> None:
    """Raises InputError where layers cannot be put in another order in memory, because tensors of the checkpoint are
    pieces of others there, or permuted."""
    naming = naming_in(folder)
    torn = [name for name in naming.merged if name not in naming.whole]
    if torn:
        raise InputError(
            f"the layers of a {naming.kind} model cannot be put in another order in memory, since its {torn[0]} is "
            "fused with others there; write the checkpoint with `evomerge merge` and use that, or search over merges "
            "of whole models."
        )
