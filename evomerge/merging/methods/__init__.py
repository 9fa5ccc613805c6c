"""The table of merge methods: one row each, one pure function of tensors each.

To add a method: write the function (float32 tensors in, one float32 tensor out), add its row here, and add its name to
the comparison with mergekit in the tests.
"""

from evomerge.errors import InputError, choices
from evomerge.merging.methods.base import Method, Parameter
from evomerge.merging.methods.linear import merge_linear
from evomerge.merging.methods.task_vectors import TaskVectorMerge

WEIGHT = Parameter("weight", float, None)
DENSITY = Parameter("density", float, 1.0)


def _task_vectors(
    name: str, paper: str, *, sparsify: str | None, consensus: bool, normalize: bool, rescale: bool
) -> Method:
    return Method(
        name=name,
        paper=paper,
        merge=TaskVectorMerge(sparsify=sparsify, consensus=consensus),
        needs_base=True,
        random=sparsify == "random",
        per_model=(WEIGHT, DENSITY) if sparsify else (WEIGHT,),
        shared=(
            Parameter("normalize", bool, normalize),
            Parameter("rescale", bool, rescale),
            Parameter("lambda", float, 1.0),
            Parameter("int8_mask", bool, False),
        ),
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
            merge=merge_linear,
            needs_base=False,
            random=False,
            per_model=(WEIGHT,),
            shared=(Parameter("normalize", bool, True),),
        ),
        _task_vectors(
            "task_arithmetic",
            "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
            sparsify=None,
            consensus=False,
            normalize=False,
            rescale=False,
        ),
        _task_vectors(
            "ties",
            "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
            sparsify="magnitude",
            consensus=True,
            normalize=True,
            rescale=False,
        ),
        _task_vectors(
            "dare_linear",
            "Yu et al. 2024, Language models are Super Mario (DARE), arXiv:2311.03099",
            sparsify="random",
            consensus=False,
            normalize=False,
            rescale=True,
        ),
        _task_vectors(
            "dare_ties",
            "Yu et al. 2024 (DARE), arXiv:2311.03099, with the sign election of TIES, arXiv:2306.01708",
            sparsify="random",
            consensus=True,
            normalize=False,
            rescale=True,
        ),
    )
}


def get(name: str, where: str) -> Method:
    """The method called `name`; `where` opens the error for an unknown one."""
    if name not in METHODS:
        raise InputError(f"{where} is '{name}', no known merge method; {choices(name, METHODS)}.")
    return METHODS[name]
