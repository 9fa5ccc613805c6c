"""View: a model with the layers of another one in a new order, made of modules and weights that are in memory already.

A layer in two places must be two modules, because each keeps its keys and values under its own number in the cache. And
a config with another depth would cut layers off. So a view copies the modules, which need little memory, numbers them,
and gives them parameters, which may be shared. Layers may also run side by side (`parallel`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from evomerge.layers import layer_index, with_layer
from evomerge.merging.resident.parallel import run_side_by_side
from evomerge.merging.skeleton import with_layers
from evomerge.recipe import Blocks

_Parameters = Mapping[int, nn.Parameter]


def make_view(
    skeleton: Any, parameters: Mapping[str, nn.Parameter], templates: Sequence[int], parallel: Blocks = ()
) -> Any:
    """A copy of a model with other layers.

    skeleton: the model to copy.
    parameters: every parameter of the view by its name in memory, tied parameters once. They are shared, not copied.
    templates: for each layer of the view, the number of the model's layer whose modules it copies.
    parallel: the blocks of the view's layers that run side by side, as in `Provenance`.
    """
    layers = _layers_of(skeleton)
    config = with_layers(skeleton.config, [(skeleton.config, template) for template in templates])
    own = dict(skeleton.named_parameters())
    outside = {id(own[name]): new for name, new in parameters.items() if layer_index(name) is None}
    inside = _by_layer(parameters, len(templates))
    built = []
    for place, template in enumerate(templates):
        replaced = {id(own[with_layer(name, template)]): new for name, new in inside[place].items()}
        built.append(_copy(layers[template], replaced, place))
    for start, end in parallel:
        run_side_by_side(built[start:end])
    view = _copy(skeleton, outside, None, {id(layers): nn.ModuleList(built)})
    for module in view.modules():
        if module.__dict__.get("config") is skeleton.config:
            module.__dict__["config"] = config
    return view


def _by_layer(parameters: Mapping[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    by_layer: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    for name, parameter in parameters.items():
        layer = layer_index(name)
        if layer is not None:
            by_layer[layer][name] = parameter
    return by_layer


def _layers_of(skeleton: Any) -> nn.ModuleList:
    """The list of layers, wherever the architecture keeps it."""
    name = next(name for name, _ in skeleton.named_parameters() if layer_index(name) is not None)
    prefix = name[: name.index(f".{layer_index(name)}.")]
    return skeleton.get_submodule(prefix)  # type: ignore[no-any-return]


def _copy(
    module: nn.Module, parameters: _Parameters, place: int | None, instead: Mapping[int, nn.Module] | None = None
) -> Any:
    """A copy of a module and of the modules in it. Everything that is not replaced is shared.

    parameters: new parameters, by the id of the parameter that they replace.
    place: the new `layer_idx`; None where it stays.
    instead: new modules, by the id of the module that they replace.
    """
    if instead and id(module) in instead:
        return instead[id(module)]
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = dict(module.__dict__)
    new.__dict__["_parameters"] = {
        name: parameters.get(id(parameter), parameter) for name, parameter in module._parameters.items()
    }
    new.__dict__["_modules"] = {
        name: child if child is None else _copy(child, parameters, place, instead)
        for name, child in module._modules.items()
    }
    if place is not None and "layer_idx" in new.__dict__:
        new.__dict__["layer_idx"] = place
    return new
