"""The methods that mergekit has not, derived a second time in float64 with NumPy, by other ways than the package's.

Eigenvalues take the place of singular values, one least-squares problem that of normal equations, loops that of masks.
"""

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Parts = list[Array]


def power(gram: Array, exponent: float) -> Array:
    """A power of a symmetric matrix without negative eigenvalues; the null space stays null."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-13 * max(values.max(), 1e-300)
    raised = np.where(kept, np.where(kept, values, 1.0) ** exponent, 0.0)
    return np.asarray((vectors * raised) @ vectors.T)


def consensus(deltas: Parts, weights: Sequence[float], thresholds: Sequence[float], agree: int) -> Array:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        own = [float(delta[place]) for delta in deltas]
        votes = sum(abs(d) >= t * abs(sum(own) - d) for d, t in zip(own, thresholds, strict=True))
        if votes >= min(agree, len(own)):
            merged[place] = sum(w * d for w, d in zip(weights, own, strict=True))
    return merged


def localize_and_stitch(deltas: Parts, weights: Sequence[float], densities: Sequence[float]) -> Array:
    stitched = np.full((len(deltas), deltas[0].size), np.nan)
    for row, delta, weight, density in zip(stitched, deltas, weights, densities, strict=True):
        sizes = np.abs(delta).ravel()
        largest = sizes >= np.sort(sizes)[-max(1, int(density * delta.size))]  # all of those that are equally large
        row[largest] = weight * delta.ravel()[largest]
    kept = ~np.isnan(stitched)
    return np.asarray((np.nansum(stitched, axis=0) / np.maximum(kept.sum(axis=0), 1)).reshape(deltas[0].shape))


def fisher(deltas: Parts, weights: Sequence[float], information: Parts, means: Sequence[float], floor: float) -> Array:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        counts = [w * max(f[place] / mean, floor) for w, f, mean in zip(weights, information, means, strict=True)]
        merged[place] = sum(c * d[place] for c, d in zip(counts, deltas, strict=True)) / sum(counts)
    return merged


def gradient_matching(
    deltas: Parts, weights: Sequence[float], information: Parts, means: Sequence[float], delta: float
) -> Array:
    """Task arithmetic less the mismatch of its gradients; the base's information comes first."""
    own, *others = (f / mean for f, mean in zip(information, means, strict=True))
    arithmetic = sum(w * d for w, d in zip(weights, deltas, strict=True))
    hessian = own + delta + sum(w * h for w, h in zip(weights, others, strict=True))
    mismatch = sum(w * h * (arithmetic - d) for w, h, d in zip(weights, others, deltas, strict=True))
    return np.asarray(arithmetic - mismatch / hessian)


def regmean(deltas: Parts, weights: Sequence[float], grams: Parts, alpha: float) -> Array:
    """By least squares on inputs that have these Gram matrices. A weight multiplies a model's outputs."""
    inputs = [power(alpha * gram + (1 - alpha) * np.diag(np.diag(gram)), 0.5) for gram in grams]
    outputs = [x @ (w * d).T for x, w, d in zip(inputs, weights, deltas, strict=True)]
    return np.asarray(np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0].T)


def tsv(deltas: Parts) -> Parts:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    lefts, sizes, rights = [], [], []
    for delta in deltas:
        values, vectors = np.linalg.eigh(delta @ delta.T)
        left, size = vectors[:, ::-1][:, :rank], np.sqrt(np.maximum(values[::-1][:rank], 0))
        lefts.append(left)
        sizes.append(size)
        rights.append(delta.T @ left / np.where(size > 0, size, 1.0))
    u, v = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=1)
    u, v = u @ power(u.T @ u, -0.5), v @ power(v.T @ v, -0.5)
    pieces = [slice(index * rank, (index + 1) * rank) for index in range(len(deltas))]
    return [u[:, piece] @ np.diag(size) @ v[:, piece].T for piece, size in zip(pieces, sizes, strict=True)]


def iso(deltas: Parts) -> Array:
    total = np.sum(deltas, axis=0)
    total = total if total.shape[0] <= total.shape[1] else total.T
    gram = total @ total.T
    merged = np.trace(power(gram, 0.5)) / len(gram) * power(gram, -0.5) @ total
    return np.asarray(merged if merged.shape == deltas[0].shape else merged.T)


def ties(deltas: Parts, weights: Sequence[float], densities: Sequence[float], normalize: bool) -> Array:
    trimmed = []
    for delta, density in zip(deltas, densities, strict=True):
        kept = max(1, int(density * delta.size))
        trimmed.append(np.where(np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-kept], delta, 0.0))
    weighted = np.stack([weight * delta for weight, delta in zip(weights, trimmed, strict=True)])
    elected = np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
    agreeing = weighted * elected > 0
    merged = (weighted * agreeing).sum(axis=0)
    by = np.tensordot(np.array(weights), agreeing.astype(float), axes=1)
    return np.asarray(merged / np.where(by == 0, 1.0, by) if normalize else merged)


def knots(deltas: Parts, merge: Callable[[Parts], Array]) -> Array:
    """merge: merges the models' coordinates."""
    beside = np.concatenate(deltas, axis=1)
    values, vectors = np.linalg.eigh(beside @ beside.T)
    basis = vectors[:, values > 1e-10 * values.max()]
    return np.asarray(basis @ merge([basis.T @ delta for delta in deltas]))


def wudi(deltas: Parts, targets: Sequence[float]) -> Array:
    """The least interference with the task vectors times their targets, by one least-squares problem in all columns."""
    sizes = [np.linalg.norm(delta) or 1.0 for delta in deltas]
    left = np.concatenate([delta / size for delta, size in zip(deltas, sizes, strict=True)])
    right = [weight * delta @ delta.T / size for delta, size, weight in zip(deltas, sizes, targets, strict=True)]
    return np.linalg.lstsq(left, np.concatenate(right, axis=1).T, rcond=1e-8)[0].T


def ace(deltas: Parts, eps: float) -> Array:
    count, (rows, columns) = len(deltas), deltas[0].shape
    sizes = np.array([np.linalg.norm(delta) ** 2 for delta in deltas])
    logs = np.log(sizes + 1e-12)
    unequal = count > 1 and logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > 0.3
    samples = [delta - delta.mean(axis=0) for delta in deltas]
    covariances = [np.cov(own, rowvar=False, bias=True) * rows for own in samples]
    traces = [np.trace(own) if unequal else 1.0 for own in covariances]
    covariances = [own / trace for own, trace in zip(covariances, traces, strict=True)]
    damped = [own + eps / trace * np.eye(columns) for own, trace in zip(covariances, traces, strict=True)]
    prior = np.ones((columns, 1)) @ np.sum(covariances, axis=0).mean(axis=0)[None] / (sizes.mean() if unequal else 1)
    whole = np.sum(damped, axis=0)
    merged = sum(own @ weight for own, weight in zip(samples, damped, strict=True)) @ np.linalg.inv(whole + prior)
    if not unequal:
        return np.asarray(merged)
    apart = sum(own @ (weight - whole / count) for own, weight in zip(samples, covariances, strict=True))
    left, values, right = np.linalg.svd(apart + merged)
    leading = int(min(rows, columns) * 0.3)
    return np.asarray(merged + values[:leading].mean() * left[:, :leading] @ right[:leading])
