"""StreamedMerge: a merge of any structure, one tensor at a time from the models' files to those of a checkpoint.

Memory holds the sources of one tensor and its merge, whatever the size of the models. The weights are bit for bit those
that ResidentModels makes in memory for the same recipe.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import InputError, WorkFailed, choices
from evomerge.layers import layer_count, layer_index, with_layer
from evomerge.merging.building import load_config
from evomerge.merging.methods.base import Inputs, Kind, Statistic
from evomerge.merging.methods.kernels import checksum, fingerprint_of, uniform_field
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.skeleton import Skeleton, skeleton_of, untied, with_layers
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.statistics import Find, Shelf
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.merging.sources.weights import HEAD_NAMES, Weights, untied_head
from evomerge.merging.streamed.chat_templates import chat_template
from evomerge.merging.streamed.shards import Layout, write_weights
from evomerge.merging.vocabulary import Vocabulary, build_vocabulary
from evomerge.recipe import Recipe

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model")
PROCESSOR = ("*processor_config.json", "chat_template.json")
GENERATION = "generation_config.json"


class StreamedMerge:
    """A recipe that has been worked out down to the shapes of its tensors, and checked.

    The output takes config, generation config and tokenizer from the base, or from the first model where there is none.

    plan: how each tensor is made.
    """

    def __init__(
        self, recipe: Recipe, models: Models, where: str, device: str, dtype: str, statistics: Find | None = None
    ) -> None:
        """recipe: what to merge.
        models: the recipe's models; their base is the first model that the recipe names.
        where: what the recipe is called, which opens an error's message.
        device: where tensors are merged, such as `cpu` or `cuda:0`.
        dtype: the dtype of the output, such as `bfloat16`.
        statistics: finds what was measured of the models.
        Raises InputError for what cannot be merged.
        """
        self._recipe, self._where = recipe, where
        if recipe.evomerge.parallel:
            start, end = recipe.evomerge.parallel[0]
            raise InputError(
                f"{where}: evomerge.parallel runs layers {start} to {end - 1} side by side, which no architecture of "
                "transformers does, so that no checkpoint can hold the model; score it in memory with `evomerge "
                "evaluate RECIPE --config SEARCH.yaml`, or remove the key to run the layers one after the other."
            )
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._first = models.base.reference
        self._folders = {reference: model.folder for reference, model in models.items()}
        self._weights = {reference: model.weights for reference, model in models.items()}
        configs = {reference: load_config(folder) for reference, folder in self._folders.items()}
        if recipe.evomerge.head_apart or untied_head(self._weights.values()) is not None:
            configs = {reference: untied(config) for reference, config in configs.items()}
        self.plan = self._planned(configs)
        self._find = statistics or Shelf(where=where).finder(models)
        for kind, reference in self.plan.statistics:
            self._find(kind, reference)
        self._vocabulary = self._built_vocabulary(configs)
        self._template = chat_template(recipe, self._folders, where) if recipe.chat_template else None
        self._skeleton = self._output_skeleton(configs)
        self._check_tensors()

    @property
    def unknown_tokens(self) -> list[str]:
        """The tokens of the output that no model has; their embeddings are zeros."""
        return self._vocabulary.unknown if self._vocabulary else []

    def _planned(self, configs: dict[str, Any]) -> MergePlan:
        every = {
            reference: tuple(skeleton_of(config, self._folders[reference]).parameters)
            for reference, config in configs.items()
        }
        self._depth = layer_count(every[self._first])
        names = {
            reference: own
            for reference, own in every.items()
            if reference == self._first or layer_count(own) != self._depth
        }
        return make_plan(self._recipe, names[self._first], self._where, names)

    def _built_vocabulary(self, configs: dict[str, Any]) -> Vocabulary | None:
        if self._recipe.vocabulary is None:
            return None
        sizes = {reference: config.get_text_config().vocab_size for reference, config in configs.items()}
        folders = {reference: self._folders[reference] for reference in self._recipe.references}
        return build_vocabulary(self._recipe.vocabulary, folders, sizes)

    def _output_skeleton(self, configs: dict[str, Any]) -> Skeleton:
        config = configs[self._first]
        if not self.plan.keeps_layers or len(self.plan.layers) != self._depth:
            origins = (next(iter(sources.items())) for sources in self.plan.layers)
            config = with_layers(config, [(configs[model], layer) for model, layer in origins])
        if self._vocabulary is not None:
            text = config.get_text_config()
            text.vocab_size = self._vocabulary.size
            for section in [config] if text is config else [config, text]:
                for key, value in self._vocabulary.moved(self._first, section.to_dict()).items():
                    setattr(section, key, value)
        config.dtype = self._dtype
        return skeleton_of(config, self._folders[self._first])

    def _check_tensors(self) -> None:
        """Raises InputError where the plan and the output's model have different tensors, or where a source of a tensor
        is missing or has another shape."""
        planned = {tensor.name for tensor in self.plan.tensors}
        different = sorted(planned ^ set(self._skeleton.parameters))
        if different:
            raise InputError(
                f"{self._where}: the model that these layers make "
                f"{'has no' if different[0] in planned else 'needs a'} tensor {different[0]}; take layers of one kind."
            )
        for tensor in self.plan.tensors:
            for model, name in _sources(tensor):
                self._check_source(model, name, tensor.name)
        kinds = {
            reference: {with_layer(name, 0): name for name in weights.table}
            for reference, weights in self._weights.items()
        }
        for reference, names in kinds.items():
            extra = sorted(names[kind] for kind in names.keys() - kinds[self._first].keys() - set(HEAD_NAMES))
            if extra:
                raise InputError(
                    f"{reference} has the tensor {extra[0]}, which the merge ({self._first}) has no place for; "
                    "name the base that it was tuned from."
                )

    def _check_source(self, model: str, name: str, output: str) -> None:
        weights, expected = self._weights[model], self._skeleton.parameters[output]
        info = weights.find(name)
        if info is None:
            raise InputError(f"{weights.source}: the weights lack {name}; {choices(name, weights.table)}.")
        shape = info.shape
        rows = output in self._skeleton.vocabulary
        if (shape[1:] == expected[1:]) if rows and self._vocabulary else (shape == expected):
            return
        advice = "only models of one shape can be merged"
        if rows and not self._vocabulary:
            advice = "say whose tokens the merge has (tokenizer_source: union, base or a model)"
        raise InputError(
            f"{self._where}: {name} of {model} has shape {list(shape)}, but the merge ({self._first}) has "
            f"{list(expected)}; {advice}."
        )

    @torch.no_grad()
    def write(self, folder: Path, shard_size: int, tokenizer: bool = True) -> str:
        """The fingerprint of the weights, which are written into a folder with configs and a tokenizer.

        folder: an empty folder.
        shard_size: the largest size of a file of weights, in bytes.
        tokenizer: whether a tokenizer is written, too. A recipe that builds one gets it in any case.
        Raises WorkFailed where a merged weight is not finite, and InputError where a source's weight is not.
        """
        layout = self._layout()
        sums: list[int] = []
        write_weights(folder, layout, self._tensors(layout, sums), shard_size)
        self._skeleton.config.save_pretrained(folder)
        self._write_generation(folder)
        if tokenizer or self._vocabulary is not None:
            self._write_tokenizer(folder)
        return fingerprint_of(sums)

    def _layout(self) -> Layout:
        """The shape and dtype of each tensor to write, wider elements first, so that every tensor is aligned."""
        layout = {name: (shape, self._dtype) for name, shape in self._skeleton.parameters.items()}
        layout |= {name: buffer for name, buffer in self._skeleton.buffers.items() if self._origin(name) is not None}
        return dict(sorted(layout.items(), key=lambda item: -item[1][1].itemsize))

    def _origin(self, buffer: str) -> tuple[str, str] | None:
        """The model and the name that a tensor that is no parameter is copied from: those of its layer's first source.
        None where the model lacks the tensor."""
        layer = layer_index(buffer)
        model, name = self._first, buffer
        if layer is not None:
            model, number = next(iter(self.plan.layers[layer].items()))
            name = with_layer(buffer, number)
        return (model, name) if name in self._weights[model].table else None

    def _tensors(self, layout: Layout, sums: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in the layout's order, each made when it is asked for. The checksums of merged tensors are added
        to `sums`."""
        merges = {tensor.name: tensor for tensor in self.plan.tensors}
        for name, (_, dtype) in layout.items():
            if name in merges:
                merged = self._merged(merges[name])
                sums.append(int(checksum(merged, name)))
                yield name, merged
                del merged
            elif origin := self._origin(name):
                yield name, self._weights[origin[0]].read(origin[1]).to(dtype)

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every merged tensor with its name, made when it is asked for; nothing is written.

        Raises as `write` does.
        """
        for tensor in self.plan.tensors:
            yield tensor.name, self._merged(tensor)

    def _merged(self, tensor: TensorMerge) -> torch.Tensor:
        merged = torch.empty(self._skeleton.parameters[tensor.name], dtype=self._dtype, device=self._device)
        self.plan.method.merge_into(merged, self._inputs(tensor))
        if not torch.isfinite(merged).all():
            raise WorkFailed(
                f"{self._where}: non-finite weights after the merge in {tensor.name}; nothing was written."
            )
        return merged

    def _inputs(self, tensor: TensorMerge) -> Inputs:
        sources = {model: self._read(model, name) for model, name in _sources(tensor)}
        if self._vocabulary is not None and tensor.name in self._skeleton.vocabulary:
            sources = self._vocabulary.aligned(sources, tensor.preferred)
        count = torch.Size(self._skeleton.parameters[tensor.name]).numel()
        return Inputs(
            base=sources[tensor.base] if tensor.base is not None else None,
            tensors=tuple(sources[model] for model in tensor.models),
            per_model=tensor.per_model,
            shared=tensor.shared,
            uniforms=lambda index: uniform_field(
                self.plan.seed, tensor.positions[index], tensor.name, count, self._device
            ),
            rescale=self.plan.rescale,
            in_layer=layer_index(tensor.name) is not None,
            statistic=partial(self._statistic, tensor),
        )

    def _statistic(self, tensor: TensorMerge, kind: Kind, index: int) -> Statistic | None:
        """A statistic of a tensor of a model. Rows of tokens that are put in another order have none."""
        model, name = tensor.source(index)
        stored = self._find(kind, model)
        own = stored.tensor_of(name)
        moved = self._vocabulary is not None and tensor.name in self._skeleton.vocabulary
        if own is None or moved:
            return None
        return Statistic(stored.read(own).to(self._device), stored.mean, stored.transposed(name))

    def _read(self, model: str, name: str) -> torch.Tensor:
        tensor = self._weights[model].read(name).to(self._device)
        self._weights[model].close()
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{self._weights[model].source}: {name} holds values that are not finite; "
                "nothing can be merged with them."
            )
        return tensor

    def _write_generation(self, folder: Path) -> None:
        file = self._folders[self._first] / GENERATION
        if not file.exists():
            return
        try:
            content = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}: no JSON of keys and values ({error}); repair or remove it.") from None
        if self._vocabulary is not None:
            content |= self._vocabulary.moved(self._first, content)
        (folder / GENERATION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write_tokenizer(self, folder: Path) -> None:
        source = self._folders[self._first]
        plain = self._vocabulary is None and self._template is None
        for file in (file for pattern in (*PROCESSOR, *(TOKENIZER if plain else ())) for file in source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
        if plain:
            return
        tokenizer = self._vocabulary.tokenizer if self._vocabulary else read_tokenizer(source)
        if self._template is not None:
            tokenizer.chat_template = self._template
        tokenizer.save_pretrained(folder)


def _sources(tensor: TensorMerge) -> list[tuple[str, str]]:
    """The models of a tensor, the base among them, each with the name of its tensor."""
    base = [(tensor.base, tensor.base_source)] if tensor.base is not None else []
    return [*base, *zip(tensor.models, tensor.sources, strict=True)]


def stored_fingerprint(folder: Path) -> str:
    """The fingerprint of the checkpoint in a folder, 16 hexadecimal digits, read one tensor at a time."""
    weights = Weights(folder)

    def checksums() -> Iterator[int]:
        for name in skeleton_of(load_config(folder), folder).parameters:
            yield int(checksum(weights.read(name), name))
            weights.close()

    return fingerprint_of(checksums())
