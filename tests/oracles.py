"""Every loss of the table once more, in float64 NumPy, as literally as its formula; and inputs to compare them on."""

import inspect

import numpy as np
import pytest
import torch

from kd_dist.compress import Basis
from kd_dist.losses import LOSSES

VOID = 255


# ------------------------------------------------------------------------------------------------------ the oracles


def log_softmax(z, axis=-1):
    z = z - z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def kl(teacher, student, temperature, axis):
    log_p, log_q = log_softmax(teacher / temperature, axis), log_softmax(student / temperature, axis)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=axis)


def resampling(old, new):
    """The (new, old) matrix that brings one side of a map from `old` places to `new`."""
    matrix = np.zeros((new, old))
    for place in range(new):
        if new <= old:
            first, last = place * old // new, -(-(place + 1) * old // new)
            matrix[place, first:last] = 1 / (last - first)
        else:
            centre = max((place + 0.5) * old / new - 0.5, 0)
            low = int(centre)
            high = min(low + 1, old - 1)
            matrix[place, low] += 1 - (centre - low)
            matrix[place, high] += centre - low
    return matrix


def on_grid(maps, grid):
    if maps.shape[2:] == tuple(grid):
        return maps
    rows, columns = (resampling(old, new) for old, new in zip(maps.shape[2:], grid, strict=True))
    return rows @ maps @ columns.T


def flat(maps):
    """(B, C, *grid) -> (B, C, P)."""
    return maps.reshape(*maps.shape[:2], -1)


def oracle_cross_entropy(logits, targets, label_smoothing=0.0):
    classes = logits.shape[1]
    if targets.ndim == 1:
        wanted = (1 - label_smoothing) * np.eye(classes)[targets] + label_smoothing / classes
        return -(wanted * log_softmax(logits)).sum(axis=-1)
    values = []
    for example, mask in zip(on_grid(logits, targets.shape[1:]), targets, strict=True):
        pixels, labels = example.reshape(classes, -1).T, mask.reshape(-1)
        pixels, labels = pixels[labels != VOID], labels[labels != VOID]
        values.append(oracle_cross_entropy(pixels, labels, label_smoothing).mean() if len(labels) else 0.0)
    return np.array(values)


def oracle_kd(student, teacher, temperature=4.0):
    return kl(teacher, student, temperature, axis=1)


def oracle_kd_binary(student, teacher, temperature=2.0):
    s, t = (student[:, 1] - student[:, 0]) / temperature, (teacher[:, 1] - teacher[:, 0]) / temperature
    p = np.exp(-np.logaddexp(0, -t))
    return temperature**2 * ((np.logaddexp(0, s) - p * s) - (np.logaddexp(0, t) - p * t))


def oracle_logit_mse(student, teacher):
    s, t = (z - z.mean(axis=1, keepdims=True) for z in (student, teacher))
    return ((s - t) ** 2).mean(axis=1)


def oracle_hard_label(student, teacher):
    return -log_softmax(student)[np.arange(len(student)), teacher.argmax(axis=1)]


def oracle_logit_std(student, teacher, temperature=2.0):
    s, t = (
        (z - z.mean(axis=1, keepdims=True)) / np.sqrt(z.var(axis=1, keepdims=True) + 1e-6) for z in (student, teacher)
    )
    return kl(t, s, temperature, axis=1)


def oracle_dkd(student, both, alpha=1.0, beta=8.0, temperature=4.0):
    values = []
    for z, y, t in zip(student, both[:, 0].astype(int), both[:, 1:], strict=True):
        others = [c for c in range(len(z)) if c != y]
        q, p = np.exp(log_softmax(z / temperature)), np.exp(log_softmax(t / temperature))
        target = p[y] * np.log(p[y] / q[y]) + p[others].sum() * np.log(p[others].sum() / q[others].sum())
        values.append(alpha * temperature**2 * target + beta * kl(t[others], z[others], temperature, axis=0))
    return np.array(values)


def oracle_dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    def correlation(a, b):
        noise = [1 + 1e-6 * (x**2).mean() / x.var() for x in (a, b)]
        return np.corrcoef(a, b)[0, 1], *noise

    def unlike(a, b):
        """Half the squared distance of unit vectors that are a little short, as they may have no direction."""
        r, one, other = correlation(a, b)
        return (1 / one + 1 / other) / 2 - r / np.sqrt(one * other)

    q, p = np.exp(log_softmax(student / temperature)), np.exp(log_softmax(teacher / temperature))
    rows, columns = (np.mean([unlike(a, b) for a, b in zip(x, y, strict=True)]) for x, y in ((q, p), (q.T, p.T)))
    return temperature**2 * (beta * rows + gamma * columns)


def oracle_kd_pixel(student, teacher, temperature=1.0):
    return kl(teacher, on_grid(student, teacher.shape[2:]), temperature, axis=1).mean(axis=(1, 2))


def oracle_cwd_features(student, teacher, temperature=4.0):
    return kl(flat(teacher), flat(on_grid(student, teacher.shape[2:])), temperature, axis=2).mean(axis=1)


def oracle_cwd(student, teacher, temperature=4.0):
    return oracle_cwd_features(
        student - student.mean(1, keepdims=True), teacher - teacher.mean(1, keepdims=True), temperature
    )


def oracle_cosine(student, teacher):
    s, t = flat(on_grid(student, teacher.shape[2:])), flat(teacher)
    cosines = (s * t).sum(1) / np.sqrt((s * s).sum(1) * (t * t).sum(1))
    return (1 - cosines).mean(axis=1)


def oracle_hint(student, teacher):
    s, t = flat(on_grid(student, teacher.shape[2:])), flat(teacher)
    s, t = (f / np.sqrt((f**2).mean(axis=(1, 2), keepdims=True)) for f in (s, t))
    return ((s - t) ** 2).mean(axis=(1, 2))


def energies(student, teacher):
    student, teacher = ((f**2).mean(axis=1, keepdims=True) for f in (student, teacher))
    return flat(on_grid(student, teacher.shape[2:]))[:, 0], flat(teacher)[:, 0]


def oracle_at(student, teacher):
    s, t = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in energies(student, teacher))
    return ((s - t) ** 2).sum(axis=1)


def oracle_saliency(student, teacher):
    lifted = [e + 1e-3 * e.mean(axis=1, keepdims=True) for e in energies(student, teacher)]
    q, p = (e / e.sum(axis=1, keepdims=True) for e in lifted)
    return (p * np.log(p / q)).sum(axis=1)


def oracle_sp(student, teacher):
    def similarity(features):
        rows = [row.ravel() for row in features]
        gram = np.array([[a @ b for b in rows] for a in rows])
        return gram / np.sqrt((gram**2).sum(axis=1, keepdims=True))

    return ((similarity(student) - similarity(teacher)) ** 2).sum() / len(student) ** 2


def huber_of(difference, delta=1.0):
    size = np.abs(difference)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


def oracle_rkd(student, teacher, distance=25.0, angle=50.0):
    def relations(features):
        points = features.reshape(len(features), -1)
        steps = points[None] - points[:, None]  # [i, j]: from i to j
        lengths = np.sqrt((steps**2).sum(axis=2))
        directions = steps / np.where(lengths > 0, lengths, 1)[..., None]
        return lengths / lengths[lengths > 0].mean(), np.einsum("ijd,ikd->ijk", directions, directions)

    (d_s, a_s), (d_t, a_t) = relations(student), relations(teacher)
    return distance * huber_of(d_s - d_t).mean() + angle * huber_of(a_s - a_t).mean()


def oracle_kd_huber(student, teacher, delta=1.0):
    return huber_of(student - teacher, delta).mean(axis=1)


def oracle_kd_mse(student, teacher):
    return ((student - teacher) ** 2).mean(axis=1)


def oracle_kd_ccc(student, teacher):
    values = []
    for s, t in zip(student.T, teacher.T, strict=True):
        covariance = np.cov(s, t, bias=True)
        spread = covariance[0, 0] + covariance[1, 1] + (s.mean() - t.mean()) ** 2
        values.append(1 - 2 * covariance[0, 1] / spread)
    return np.mean(values)


def where_labelled(targets, values):
    return np.where(np.isnan(targets).any(axis=1), 0.0, values)


def oracle_huber(student, targets, delta=1.0):
    return where_labelled(targets, oracle_kd_huber(student, targets, delta))


def oracle_mse(student, targets):
    return where_labelled(targets, oracle_kd_mse(student, targets))


def oracle_ccc(student, targets):
    known = ~np.isnan(targets).any(axis=1)
    return oracle_kd_ccc(student[known], targets[known])


def oracle_teacher_bounded(student, both, margin=0.0):
    targets, teacher = both[:, 0], both[:, 1]
    own, its = oracle_kd_mse(student, targets), oracle_kd_mse(teacher, targets)
    return where_labelled(targets, np.where(own > its + margin, own, 0.0))


def oracle_ail(student, both, eta):
    targets, teacher = both[:, 0], both[:, 1]
    trust = np.maximum(1 - oracle_kd_mse(teacher, targets) / eta, 0)
    return where_labelled(targets, trust * oracle_kd_mse(student, teacher))


ORACLES = {name.removeprefix("oracle_"): function for name, function in globals().items() if name.startswith("oracle_")}


# -------------------------------------------------------------------------------------------------------- the inputs


NEEDED = {"ail": {"eta": 20.0}}  # what a loss cannot be computed without


def options_of(name, row):
    """The defaults, then each numeric option at the ends of its range and at a value between."""
    between = {name: low + 0.05 * (high - low) for name, (low, high) in row.ranges.items()}
    ends = [{name: end} for name, limits in row.ranges.items() for end in limits]
    return [NEEDED.get(name, {}), between, *ends] if row.ranges else [{}]


GRIDS = [((4, 6), (4, 6)), ((8, 9), (4, 6)), ((2, 4), (4, 6)), ((2, 13), (4, 6)), ((9,), (9,))]


def shapes_of(name):
    """What one example of the student's tensor and one of what it is compared with may look like."""
    row = LOSSES[name]
    if row.student == "logits":
        found = []
        if "classification" in row.tasks:
            classes = [c for c in (2, 3, 10, 1000) if row.classes[0] <= c <= (row.classes[1] or c)]
            against = {"targets": lambda c: (1 + c,) if row.with_teacher else ()}.get(row.against, lambda c: (c,))
            found += [((c,), against(c)) for c in classes]
        if "segmentation" in row.tasks:
            for classes in (2, 21):
                for own, other in GRIDS[:4]:
                    found.append(((classes, *own), other if row.against == "targets" else (classes, *other)))
        if row.tasks == ("regression",):
            found = [((outputs,), (2, outputs) if row.with_teacher else (outputs,)) for outputs in (1, 2, 5)]
        return found
    own = 7 if row.student == "projected" else 5
    grids = GRIDS if name in ("at", "saliency", "cwd_features") else [*GRIDS, ((), ())]
    found = [((own, *grid), (7, *other)) for grid, other in grids]
    return [*found, ((5, 6), (7, 2, 3))] if row.relational else found


CASES = [
    pytest.param(name, shapes, options, id=f"{name}-{shapes[0]}-{shapes[1]}-{options}".replace(" ", ""))
    for name, row in LOSSES.items()
    for shapes in shapes_of(name)
    for options in options_of(name, row)
]


def cases(wanted):
    """Those whose (name, row, shapes) are wanted."""
    return [case for case in CASES if wanted(case.values[0], LOSSES[case.values[0]], case.values[1])]


def inputs(name, shapes, batch=None, seed=0, scale=3.0):
    """What the loss reads: the student's tensor, and the targets or the teacher's tensor; see `function_of`."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch or (12 if LOSSES[name].relational else 64)
    student = scale * torch.randn(batch, *shapes[0], generator=generator)
    if LOSSES[name].against != "targets":
        return student, scale * torch.randn(batch, *shapes[1], generator=generator)
    if LOSSES[name].tasks == ("regression",):
        return student, unlabelled_last(scale * torch.randn(batch, *shapes[1], generator=generator))
    if LOSSES[name].with_teacher:
        return student, labelled(scale * torch.randn(batch, shapes[0][0], generator=generator), generator)
    targets = torch.randint(shapes[0][0], (batch, *shapes[1]), generator=generator)
    return student, void_some(targets, generator) if shapes[1] else targets


def unlabelled_last(targets):
    """(B, D), or (B, 2, D) with the teacher's outputs behind the targets: one output of the last row has no label."""
    targets[-1].view(-1)[0] = torch.nan
    return targets


def labelled(teacher, generator):
    """Teacher's logits (B, C) behind a column of labels, which every precision can write: (B, 1 + C)."""
    labels = torch.randint(min(teacher.shape[1], 256), (len(teacher), 1), generator=generator)
    return torch.cat([labels.to(teacher.dtype), teacher], dim=1)


def function_of(name):
    """A loss as a function of two tensors: with a teacher beside the targets, the second is (B, 2, D) of both, or
    (B, 1 + C) of label and logits."""
    function = LOSSES[name].function
    if not LOSSES[name].with_teacher:
        return function
    if "classification" in LOSSES[name].tasks:
        return lambda student, both, **options: function(student, both[:, 0].long(), both[:, 1:], **options)
    return lambda student, both, **options: function(student, both[:, 0], both[:, 1], **options)


def void_some(masks, generator):
    """As uint8, a third of the pixels without a label, and the last mask without any."""
    masks = torch.where(torch.rand(masks.shape, generator=generator) < 1 / 3, VOID, masks)
    masks[-1] = VOID
    return masks.to(torch.uint8)


def wide(against):
    """As numpy: float tensors in float64, targets as they are."""
    return against.double().numpy() if against.is_floating_point() else against.numpy()


def rounding(name, options):
    """How far a value may be from the exact one: logits are about 10, a KL is multiplied by T^2, others by weights."""
    row = LOSSES[name]
    defaults = {p.name: p.default for p in inspect.signature(row.function).parameters.values()}
    values = {option: options.get(option, defaults[option]) for option in row.ranges}
    weights = sum(values.get(weight, 0) for weight in ("alpha", "beta", "gamma")) or 1
    relations = values.get("distance", 0) + values.get("angle", 0)
    return 1e-5 + 2e-6 * weights * values.get("temperature", 1) ** 2 + 1e-6 * relations


def frame(basis: Basis) -> torch.Tensor:
    """The orthonormal frame (C, W) of what `FeatureCodec.in_coordinates` decodes: channels = frame @ coordinates."""
    mean, components = (one.double() for one in basis)
    outside = mean - components.T @ (components @ mean)
    directions = [*components, *([outside / outside.norm()] if len(components) < len(mean) else [])]
    return torch.stack(directions, dim=1).float()
