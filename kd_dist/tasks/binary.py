"""Two classes, of which class 1 is the positive one: metrics of how well a score ranks, by example and by video.

The score of an example is the margin z1 - z0 in float64, not its sigmoid, in which every margin from 37 on is the same.
"""

import math
from collections import defaultdict

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

HIGHER_IS_BETTER = {"auc": True, "eer": False, "video_auc": True}
ROC = "roc"  # beside the metrics: the curve, (n, 2) float64
POINTS = 200  # of a curve, at most
NO_VIDEO = 0  # in `groups`: the example is of no video


def counts(scores: Tensor, positive: Tensor) -> Tensor:
    """The ROC of scores (B,) with `positive` (B,) bool, as counts (n, 2) int64: negatives and positives that score at
    least as high, for no example and then for each distinct score from the highest down. Equal scores are one step.
    """
    values, places = scores.unique(return_inverse=True)
    each = [torch.bincount(places[chosen], minlength=len(values)) for chosen in (~positive, positive)]
    steps = torch.stack(each, dim=1).flip(0).cumsum(0)
    return torch.cat([steps.new_zeros(1, 2), steps])


def is_undefined(scores: Tensor, positive: Tensor) -> bool:
    """Whether nothing can be ranked: a class is missing, or a score is NaN."""
    return bool(scores.isnan().any()) or not (positive.any() and (~positive).any())


def area(roc: Tensor) -> float:
    """The area under a curve of `counts`: the share of pairs, a positive and a negative, of which the positive scores
    higher; equal scores count half."""
    negatives, positives = roc.T
    halves = (negatives.diff() * (positives[1:] + positives[:-1])).sum()
    return int(halves) / (2 * int(negatives[-1]) * int(positives[-1]))


def equal_error(roc: Tensor) -> float:
    """The error rate at which as large a share of the negatives as of the positives is taken for the other class, on
    the straight line between two neighbours of a curve of `counts`."""
    negatives, positives = roc.T
    most, total = int(negatives[-1]), int(positives[-1])
    gap = negatives * total + positives * most - most * total  # (false positive rate - false negative rate), in counts
    after = int((gap < 0).sum())  # the gap grows at every point, from below 0 to above it
    left, right = gap[after - 1 : after + 1].tolist()
    start, end = negatives[after - 1 : after + 1].tolist()
    return (start + (end - start) * -left / (right - left)) / most


def thinned(roc: Tensor) -> Tensor:
    """A curve of `counts` as rates (n, 2) float64, false and true positive, of POINTS of its points at most."""
    rates = roc.double() / roc[-1]
    steps = roc.diff(dim=0)
    bends = steps[:-1, 0] * steps[1:, 1] != steps[:-1, 1] * steps[1:, 0]
    kept = torch.cat([bends.new_ones(1), bends, bends.new_ones(1)])
    rates = rates[kept]
    if len(rates) <= POINTS:
        return rates
    along = rates.sum(dim=1)
    places = torch.arange(POINTS, dtype=along.dtype, device=along.device) * 2 / (POINTS - 1)
    return rates[torch.searchsorted(along, places).clamp(max=len(rates) - 1).unique()]


def by_video(scores: Tensor, positive: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (V,) float64 and labels (V,) bool of the videos of examples (B,) with `groups` (B, 2): digests of video
    and frame.

    The score of a frame is the highest of its faces, that of a video the mean over its frames, each the probability of
    class 1. A video is positive when one of its examples is. Examples of no video are left out.
    """
    frames: dict[tuple[int, int], float] = {}
    labels: dict[int, bool] = {}
    rows = zip(groups.tolist(), torch.sigmoid(scores).tolist(), positive.tolist(), strict=True)
    for (video, frame), p, label in rows:
        if video != NO_VIDEO:
            known = frames.get((video, frame), p)
            frames[video, frame] = p if math.isnan(p) or p > known else known
            labels[video] = labels.get(video, False) or label
    videos = defaultdict(list)
    for (video, _), p in frames.items():
        videos[video].append(p)
    # fsum: to the last bit the same in whatever order the frames came.
    means = [math.fsum(videos[video]) / len(videos[video]) for video in labels]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(list(labels.values()), dtype=torch.bool)


class Ranking(torchmetrics.Metric):
    """`auc`, `eer`, `video_auc` and the curve `roc`, over every row of all processes. NaN where one is undefined: a
    class is missing, a score is NaN, no example is of a video; there is no curve then."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "positive", "groups"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        """No rows, as tensors of their kind: a process without any gathers as well."""
        self.scores.append(torch.zeros(0, dtype=torch.float64, device=self.device))
        self.positive.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        self.groups.append(torch.zeros(0, 2, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        super().reset()
        self._begin()

    def update(self, logits: Tensor, targets: Tensor, groups: Tensor | None = None) -> None:
        z = logits.detach().double()
        self.scores.append(z[:, 1] - z[:, 0])
        self.positive.append((targets == 1).to(torch.uint8))
        none = targets.new_full((len(targets), 2), NO_VIDEO, dtype=torch.int64)
        self.groups.append(none if groups is None else groups)

    def compute(self) -> dict[str, Tensor]:
        scores, positive, groups = (dim_zero_cat(one).cpu() for one in (self.scores, self.positive, self.groups))
        found = dict.fromkeys(HIGHER_IS_BETTER, math.nan)
        curve = {}
        if not is_undefined(scores, positive.bool()):
            roc = counts(scores, positive.bool())
            found |= {"auc": area(roc), "eer": equal_error(roc)}
            curve = {ROC: thinned(roc)}
        videos = by_video(scores, positive.bool(), groups)
        if not is_undefined(*videos):
            found["video_auc"] = area(counts(*videos))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()} | curve
