"""The table of merge methods: one row each, one pure function of tensors each.

To add a method: write the function (float32 tensors in, one float32 tensor out), and add its row here. Tests compare a
row with mergekit, or with a second derivation in NumPy where it says `mergekit=False`.
"""

from dataclasses import replace
from functools import cache, partial

from evomerge.errors import InputError, choices
from evomerge.merging.methods.aim import keep_base
from evomerge.merging.methods.base import Method, Needed, Parameter, Range
from evomerge.merging.methods.fisher import merge_fisher, merge_gradient_matching
from evomerge.merging.methods.linear import merge_linear
from evomerge.merging.methods.model_stock import merge_model_stock
from evomerge.merging.methods.passthrough import merge_passthrough
from evomerge.merging.methods.regmean import merge_regmean, merge_regmean_plus
from evomerge.merging.methods.regression import merge_ace, merge_wudi
from evomerge.merging.methods.rows import WithRowWeights
from evomerge.merging.methods.selection import (
    merge_arcee_fusion,
    merge_nearswap,
    merge_ram,
    merge_ramplus_tl,
    merge_sce,
)
from evomerge.merging.methods.spectral import merge_iso, merge_knots, merge_tsv
from evomerge.merging.methods.spherical import merge_karcher, merge_multislerp, merge_nuslerp, merge_slerp
from evomerge.merging.methods.stitching import merge_consensus, merge_localize_and_stitch
from evomerge.merging.methods.task_vectors import TaskVectorMerge

WEIGHT = Parameter("weight", float, None)
DENSITY = Parameter("density", float, 1.0, within=(0.0, 1.0))
INT8_MASK = Parameter("int8_mask", bool, False)  # mergekit's memory saver; accepted, not needed
LAMBDA = Parameter("lambda", float, 1.0)
ALPHA = Parameter("alpha", float, 1.0, search=Range(0.0, 2.0, 1.0, 0.2))
OMEGA = Parameter("omega", float, 0.4, within=(0.0, 1.0), search=Range(0.0, 1.0, 0.4, 0.15))
LEAST_CHANGE = Parameter("epsilon", float, 1e-5, search=Range(0.0, 1e-3, 1e-5, 1e-4))
OFF_DIAGONAL = Parameter("alpha", float, 0.9, within=(0.0, 1.0), search=Range(0.0, 1.0, 0.9, 0.1))
_OF_SPARSIFIERS = {
    "outliers": (Parameter("gamma", float, 0.01, search=Range(0.0, 0.1, 0.01, 0.01), cuts=True),),
    "magprune": (Parameter("epsilon", float, 0.15, search=Range(0.0, 0.3, 0.15, 0.05)),),
}


def _task_vectors(
    name: str, paper: str, *, sparsify: str | None, consensus: bool, normalize: bool, rescale: bool
) -> Method:
    cuts = sparsify in ("magnitude", "outliers")
    return Method(
        name=name,
        paper=paper,
        function=TaskVectorMerge(sparsify=sparsify, consensus=consensus),
        base="required",
        random=sparsify in ("random", "magprune"),
        per_model=(WEIGHT, replace(DENSITY, cuts=cuts), *_OF_SPARSIFIERS.get(sparsify, ())) if sparsify else (WEIGHT,),
        shared=(
            Parameter("normalize", bool, normalize),
            Parameter("rescale", bool, rescale),
            LAMBDA,
            INT8_MASK,
        ),
        slopes=("weight", "lambda"),
    )


# Rows of methods that mergekit has not. They are smooth by a weight for each model and lambda, or by one alpha.
_beyond = partial(Method, base="required", mergekit=False)
_weighted = partial(_beyond, per_model=(WEIGHT,), shared=(LAMBDA,), slopes=("weight", "lambda"))
_scaled = partial(_beyond, shared=(ALPHA,), slopes=("alpha",))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
            function=merge_linear,
            base="ignored",
            per_model=(WEIGHT,),
            shared=(Parameter("normalize", bool, True),),
            slopes=("weight",),
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
        _task_vectors(
            "breadcrumbs",
            "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795",
            sparsify="outliers",
            consensus=False,
            normalize=False,
            rescale=False,
        ),
        _task_vectors(
            "breadcrumbs_ties",
            "Davari and Belilovsky 2023 (Model Breadcrumbs), arXiv:2312.06795, with the sign election of TIES",
            sparsify="outliers",
            consensus=True,
            normalize=False,
            rescale=False,
        ),
        _task_vectors(
            "della",
            "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
            sparsify="magprune",
            consensus=True,
            normalize=True,
            rescale=True,
        ),
        _task_vectors(
            "della_linear",
            "Deep et al. 2024 (DELLA), arXiv:2406.11617, without the election of a sign",
            sparsify="magprune",
            consensus=False,
            normalize=False,
            rescale=True,
        ),
        Method(
            name="slerp",
            paper="Shoemake 1985, Animating rotation with quaternion curves, doi:10.1145/325334.325242",
            function=merge_slerp,
            base="required",
            shared=(Parameter("t", float, None, search=Range(0.0, 1.0, 0.5, 0.2)),),
            most=1,
            slopes=("t",),
        ),
        Method(
            name="nuslerp",
            paper="Goddard et al. 2024, Arcee's MergeKit, arXiv:2403.13257",
            function=merge_nuslerp,
            base="optional",
            per_model=(WEIGHT,),
            shared=(
                Parameter("nuslerp_row_wise", bool, False, search=Range(0, 1, 0, 1)),
                Parameter("nuslerp_flatten", bool, True, search=Range(0, 1, 1, 1)),
            ),
            least=2,
            most=2,
            slopes=("weight",),
            smooth_where="nuslerp_flatten",
        ),
        Method(
            name="multislerp",
            paper="Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            function=merge_multislerp,
            base="optional",
            per_model=(WEIGHT,),
            shared=(Parameter("normalize_weights", bool, True), Parameter("eps", float, 1e-8)),
            slopes=("weight",),
        ),
        Method(
            name="karcher",
            paper="The Karcher mean of models on the sphere, arXiv:2603.04972",
            function=merge_karcher,
            base="ignored",
            shared=(Parameter("max_iter", int, 10, search=Range(1, 20, 10, 4)), Parameter("tol", float, 1e-5)),
        ),
        Method(
            name="model_stock",
            paper="Jang et al. 2024, Model Stock, arXiv:2403.19522",
            function=merge_model_stock,
            base="required",
            shared=(Parameter("filter_wise", bool, False, search=Range(0, 1, 0, 1)),),
            least=2,
        ),
        Method(
            name="sce",
            paper="Wan et al. 2024, FuseChat, arXiv:2408.07990",
            function=merge_sce,
            base="required",
            shared=(INT8_MASK, Parameter("select_topk", float, 1.0, search=Range(0.05, 1.0, 1.0, 0.15), cuts=True)),
        ),
        Method(
            name="ram",
            paper="Reinforced Agent Merging, arXiv:2601.13572",
            function=merge_ram,
            base="required",
            shared=(LEAST_CHANGE,),
        ),
        Method(
            name="ramplus_tl",
            paper="Reinforced Agent Merging (RAM+), arXiv:2601.13572",
            function=merge_ramplus_tl,
            base="required",
            shared=(
                Parameter("r", float, 0.1, search=Range(0.0, 1.0, 0.1, 0.1)),
                Parameter("alpha", float, 0.2, search=Range(0.0, 1.0, 0.2, 0.1)),
                LEAST_CHANGE,
            ),
        ),
        Method(
            name="nearswap",
            paper="alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            function=merge_nearswap,
            base="required",
            shared=(Parameter("t", float, None, search=Range(0.0, 0.01, 0.001, 0.002)),),
            most=1,
            slopes=("t",),
        ),
        Method(
            name="arcee_fusion",
            paper="Goddard et al. 2024, Arcee's MergeKit, arXiv:2403.13257",
            function=merge_arcee_fusion,
            base="required",
            most=1,
        ),
        Method(
            name="passthrough",
            paper="Goddard et al. 2024, Arcee's MergeKit, arXiv:2403.13257",
            function=merge_passthrough,
            base="ignored",
            per_model=(Parameter("scale", float, 1.0, search=Range(0.5, 1.5, 1.0, 0.1)),),
            most=1,
            slopes=("scale",),
        ),
        _weighted(
            name="consensus",
            paper="Wang et al. 2024, Localizing task information (TALL masks), arXiv:2405.07813",
            function=merge_consensus,
            per_model=(WEIGHT, Parameter("threshold", float, 0.4, search=Range(0.0, 1.0, 0.4, 0.1))),
            shared=(Parameter("agree", int, 2, search=Range(1, 3, 2, 1)), LAMBDA),
        ),
        _weighted(
            name="localize_and_stitch",
            paper="He et al. 2024, Localize-and-Stitch, arXiv:2408.13656",
            function=merge_localize_and_stitch,
            per_model=(WEIGHT, replace(DENSITY, default=0.05, cuts=True)),
        ),
        _weighted(
            name="tsv",
            paper="Gargiulo et al. 2024, Task singular vectors, arXiv:2412.00081",
            function=merge_tsv,
        ),
        _scaled(
            name="iso",
            paper="Marczak et al. 2025, No task left behind (Iso-C), arXiv:2502.04959",
            function=merge_iso,
        ),
        _beyond(
            name="knots",
            paper="Stoica et al. 2024, Model merging with SVD to tie the KnOTS, arXiv:2410.19735",
            function=merge_knots,
            per_model=(WEIGHT, replace(DENSITY, cuts=True)),
            shared=(Parameter("normalize", bool, True), Parameter("rescale", bool, False), LAMBDA),
        ),
        _weighted(
            name="wudi",
            paper="Cheng et al. 2025, Whoever started the interference should end it, arXiv:2503.08099",
            function=merge_wudi,
        ),
        _scaled(
            name="ace",
            paper="Xu et al. 2026, ACE-Merging, arXiv:2603.02945",
            function=merge_ace,
            shared=(ALPHA, Parameter("eps", float, 1e-2)),
        ),
        _weighted(
            name="fisher",
            paper="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv:2111.09832",
            function=merge_fisher,
            shared=(Parameter("floor", float, 1e-3, within=(0.0, 1e6), search=Range(0.0, 1.0, 1e-3, 0.1)), LAMBDA),
            statistics=(Needed("fisher"),),
        ),
        _beyond(
            name="gradient_matching",
            paper="Daheim et al. 2023, Model merging by uncertainty-based gradient matching, arXiv:2310.12808",
            function=merge_gradient_matching,
            per_model=(WEIGHT,),
            shared=(Parameter("delta", float, 0.1, within=(0.0, 1e6), search=Range(0.0, 2.0, 0.1, 0.2)),),
            slopes=("weight",),
            statistics=(Needed("fisher", "all"),),
        ),
        _weighted(
            name="regmean",
            paper="Jin et al. 2023, Dataless knowledge fusion by merging weights (RegMean), arXiv:2212.09849",
            function=merge_regmean,
            shared=(OFF_DIAGONAL, LAMBDA),
            statistics=(Needed("grams"),),
        ),
        _weighted(
            name="regmean_plus",
            paper="Nguyen et al. 2025, RegMean++, arXiv:2508.03121",
            function=merge_regmean_plus,
            shared=(OFF_DIAGONAL, LAMBDA),
            statistics=(Needed("merged_grams"),),
        ),
    )
}
STEPS = {
    "rows": "rows weighted as gradients have learned, after Yang et al. 2024 (AdaMerging), arXiv:2310.02575",
    "aim": "Nobari et al. 2025, Activation-informed merging (AIM), arXiv:2502.02421",
}
"""What may be done before or behind a merge; a method's name has the steps behind it, in this order."""


def get(name: str, where: str) -> Method:
    """The method of a name.

    name: as a recipe gives it, such as `ties`, or with a step, such as `ties+aim`.
    where: the place of the name in a file, which opens an error's message.
    Raises InputError for an unknown name.
    """
    plain, *steps = name.split("+")
    if plain not in METHODS:
        raise InputError(f"{where} is '{name}', no known merge method; {choices(plain, METHODS)}.")
    for step in steps:
        if step not in STEPS:
            raise InputError(f"{where} is '{name}', but '{step}' is no known step; {choices(step, STEPS)}.")
    found = find(name)
    if found is None and not METHODS[plain].uses_base:
        raise InputError(
            f"{where} is '{name}', but {plain} sets no base apart, so nothing says what it has added; use "
            "task_arithmetic, which with normalize: true is an average."
        )
    if found is None:
        raise InputError(f"{where} is '{name}'; name each step once, in this order: {', '.join(STEPS)}.")
    return found


@cache
def find(name: str) -> Method | None:
    """The method of a name (see `get`); None where there is none."""
    plain, *steps = name.split("+")
    if plain not in METHODS or steps != [step for step in STEPS if step in steps]:
        return None
    method = METHODS[plain]
    if steps and not method.uses_base:
        return None
    for step in steps:
        method = _WITH[step](method)
    return method


def _with(step: str, row: Method) -> Method:
    """A method with a step. mergekit knows no such name, so it cannot merge the recipe without the step."""
    paper = f"{row.paper}; {STEPS[step]}"
    return replace(row, name=f"{row.name}+{step}", paper=paper, base="required", mergekit=False)


def _with_rows(row: Method) -> Method:
    """A method on models whose rows are weighted."""
    statistics = (*row.statistics, Needed("row_weights"))
    return replace(_with("rows", row), function=WithRowWeights(row.function), statistics=statistics)


def _with_aim(row: Method) -> Method:
    """A method with AIM behind it."""
    statistics = (*row.statistics, Needed("activations", "base"))
    return replace(_with("aim", row), shared=(*row.shared, OMEGA), statistics=statistics, post=keep_base)


_WITH = {"rows": _with_rows, "aim": _with_aim}
