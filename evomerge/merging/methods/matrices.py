"""Methods on whole matrices: parts that are worked out once from the models, and the pass that adds them to the base.

Parts are computed in float64 on one thread of the CPU and kept in float32, whatever the device and the number of
threads, so these change no bit of a merge. Another kind of CPU may round differently in the last place of float64.

Such a method takes the weight matrices of layers. All other tensors (norms, biases, embeddings, the head) are merged as
the papers' own code merges what is no matrix of a layer: the average of the task vectors takes the place of the parts.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import Coefficient, around
from evomerge.merging.methods.parts import Elements, whole_of
from evomerge.merging.methods.passes import Numbers, Pass, Slope, Tensors, numbers_on
from evomerge.merging.methods.task_vectors import total_of

Matrices = list[torch.Tensor]
NEGLIGIBLE = 1e-9  # the share of the largest singular value up to which another counts as 0


def is_layer_matrix(inputs: Inputs) -> bool:
    """Whether a tensor is a weight matrix of a layer."""
    return inputs.in_layer and len(inputs.tensors[0].shape) == 2


def weighted(inputs: Inputs, what: Hashable, make: Callable[[Matrices], Matrices]) -> Pass:
    """The pass that computes base + lambda sum_i w_i p_i, where the parts p_i depend on the models alone.

    inputs: the tensors, with weights and lambda.
    what: the name under which the parts are kept.
    make: the task vectors -> one part for each.
    """
    assert inputs.base is not None
    coefficients = [weight * inputs.shared["lambda"] for weight in inputs.each("weight")]
    if not is_layer_matrix(inputs):
        return averaged(inputs)
    return added(inputs.base, parts(inputs, what, make), coefficients)


def averaged(inputs: Inputs) -> Pass:
    """The pass that computes base + lambda sum_i w_i d_i / T, for T models with weights."""
    return _average(inputs, [weight * inputs.shared["lambda"] for weight in inputs.each("weight")])


def scaled(inputs: Inputs, what: Hashable, make: Callable[[Matrices], Matrices]) -> Pass:
    """The pass that computes base + alpha p, where the one part p depends on the models alone (see `weighted`)."""
    assert inputs.base is not None
    alpha = inputs.shared["alpha"]
    if not is_layer_matrix(inputs):
        return _average(inputs, [alpha] * len(inputs.tensors))
    return added(inputs.base, parts(inputs, what, make), [alpha])


def _average(inputs: Inputs, coefficients: Sequence[Coefficient]) -> Pass:
    assert inputs.base is not None
    return around(inputs.base, inputs.tensors, 1.0, [each / len(inputs.tensors) for each in coefficients])


def parts(inputs: Inputs, what: Hashable, make: Callable[[Matrices], Matrices]) -> tuple[torch.Tensor, ...]:
    """What is computed from the task vectors of all models; float32, on the inputs' device. It is made once for all
    candidates that merge the same models.

    inputs: the tensors.
    what: the name under which it is kept.
    make: the task vectors, float64, on the CPU -> the parts.
    """

    def made() -> tuple[torch.Tensor, ...]:
        with on_one_thread():
            found = _unless_broken(make, _deltas(inputs))
        return tuple(part.to(torch.float32).contiguous().to(inputs.device) for part in found)

    return inputs.once(what, (-1, *range(len(inputs.tensors))), made)


def _deltas(inputs: Inputs) -> Matrices:
    assert inputs.base is not None
    base = wide(inputs.base)
    return [wide(tensor) - base for tensor in inputs.tensors]


def _unless_broken(make: Callable[[Matrices], Matrices], deltas: Matrices) -> Matrices:
    """What `make` makes; NaNs where a task vector is not finite, since decompositions would raise."""
    if deltas[0].is_meta or all(bool(torch.isfinite(delta).all()) for delta in deltas):
        return make(deltas)
    return [torch.full_like(part, torch.nan) for part in make([torch.zeros_like(delta) for delta in deltas])]


def wide(tensor: Elements) -> torch.Tensor:
    """A float64 copy on the CPU; on the meta device where the tensor has no data."""
    whole = whole_of(tensor)
    return whole.to(whole.device if whole.is_meta else "cpu").to(torch.float64).contiguous()


@contextmanager
def on_one_thread() -> Iterator[None]:
    """A context in which torch computes on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def added(base: Elements, own: Sequence[torch.Tensor], coefficients: Sequence[Coefficient]) -> Pass:
    """The pass that computes base + sum_i coefficients_i p_i.

    base: the base's tensor.
    own: the parts p_i, each of the base's shape.
    coefficients: one for each part.
    """
    return Pass(_add, (base, *own), numbers_on(base.device, coefficient=coefficients), slopes=_add_slopes)


def _add(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, *own = tensors
    for part, coefficient in zip(own, numbers["coefficient"], strict=True):
        part *= coefficient
    base += total_of(own)
    return base


def _add_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    for index, part in enumerate(tensors[1:]):
        yield "coefficient", index, part


def singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A thin singular value decomposition: vectors as columns, values, vectors as rows. Negligible values become 0, and
    so do their vectors, which no computation determines."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    counts = (values > NEGLIGIBLE * values[:1]).to(matrix.dtype)
    return left * counts, values * counts, right * counts[:, None]


def pseudo_inverse(gram: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of a symmetric matrix with no negative eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    counts = values > _LEAST_OF_GRAM * values[-1:]
    inverses = torch.where(counts, 1 / torch.where(counts, values, 1.0), 0.0)
    inverse: torch.Tensor = (vectors * inverses) @ vectors.T
    return inverse


_LEAST_OF_GRAM = 1e-12  # squares of singular values, so a millionth of the largest of them counts
