"""Metrics over a split: the same however it is cut into batches, and no row counts twice."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from kd_dist import assemble
from kd_dist.batch import Batch
from kd_dist.data import batches, read_examples
from kd_dist.evaluation import agree_on_buffers, evaluate
from kd_dist.plan import Plan, Sequential

CPU = torch.device("cpu")


def predict(batch: Batch) -> torch.Tensor:
    """Some logits (B, 3) from the pixels, right more often than not."""
    return batch.images.float().mean(dim=(2, 3)).flip(1) / 16


def evaluated(recipe, split: str, batch_size: int, world: int = 1) -> list[dict[str, float]]:
    """The metrics of each rank's batches by themselves."""
    found = []
    for rank in range(world):
        corridor = assemble.evaluation_corridor(recipe, split, rank, world, cached=False)
        plan = Plan(Sequential(len(corridor.examples)), batch_size, world, 1)
        corridor = assemble.Corridor(**{**vars(corridor), "plan": plan})
        found.append(evaluate(predict, batches(corridor, 0, len(corridor), 0, pin=False), 3, CPU))
    return found


def by_hand(recipe, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Targets and logits of a split, each example decoded and fed by itself."""
    corridor = assemble.evaluation_corridor(recipe, split, 0, 1, cached=False)
    examples = read_examples(corridor.examples, np.arange(len(corridor.examples)), corridor.decode)
    single = assemble.Corridor(**{**vars(corridor), "plan": Plan(Sequential(len(examples)), 1, 1, 1)})
    return np.array([example.target for example in examples]), torch.cat([predict(batch) for batch in single]).numpy()


def test_a_split_agrees_with_scikit_learn(packed):
    targets, logits = by_hand(packed, "train")
    [found] = evaluated(packed, "train", 8)
    p = torch.from_numpy(logits).double().softmax(1).numpy()
    assert 20 < len(targets) < 40
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)), abs=1e-7)
    assert 0.5 < found["accuracy"]
    assert found["nll"] == pytest.approx(log_loss(targets, p, labels=range(3)), rel=1e-12)


def test_the_size_of_a_batch_changes_nothing(packed):
    results = [evaluated(packed, "train", size)[0] for size in (1, 3, 7, 8, 1000)]
    for other in results[1:]:
        assert other["accuracy"] == results[0]["accuracy"]
        assert other["nll"] == pytest.approx(results[0]["nll"], rel=1e-13)


def test_ranks_and_their_empty_shares_add_up_to_the_whole(packed):
    """5 ranks over batches of 4: in every step at least one has only a filler row, which must not count."""
    targets, _ = by_hand(packed, "val")
    rows, right = [], []
    for rank in range(5):
        corridor = assemble.evaluation_corridor(packed, "val", rank, 5, cached=False)
        corridor = assemble.Corridor(**{**vars(corridor), "plan": Plan(Sequential(len(targets)), 4, 5, 1)})
        share = list(corridor)
        rows.append(sum(int(batch.valid.sum()) for batch in share))
        assert any(not batch.valid.any() for batch in share) or rank > 0
        right.append(evaluate(predict, share, 3, CPU)["accuracy"] * rows[-1] if rows[-1] else 0.0)
    assert sum(rows) == len(targets)
    [whole] = evaluated(packed, "val", 8)
    assert sum(right) / len(targets) == pytest.approx(whole["accuracy"], abs=1e-6)


def test_a_filler_row_is_not_counted(packed):
    corridor = assemble.evaluation_corridor(packed, "val", 0, 1, cached=False)
    [batch] = list(corridor)
    # A filler that would be wrong: another class than its pixels show, in its own batch.
    filler = Batch(
        batch.keys[:1], batch.images[:1], (batch.targets[:1] + 1) % 3, torch.zeros(1, dtype=torch.bool), 1, None
    )
    assert evaluate(predict, [batch, filler], 3, CPU) == evaluate(predict, [batch], 3, CPU)


def test_nothing_is_recorded_for_a_gradient(packed):
    corridor = assemble.evaluation_corridor(packed, "val", 0, 1, cached=False)
    head = nn.Linear(3, 3)
    seen = []

    def with_head(batch: Batch) -> torch.Tensor:
        seen.append(head(predict(batch)))
        return seen[-1]

    evaluate(with_head, list(corridor), 3, CPU)
    assert seen and not any(logits.requires_grad for logits in seen)


def test_half_precision_logits_are_measured_in_full(packed):
    [batch] = list(assemble.evaluation_corridor(packed, "val", 0, 1, cached=False))
    half = predict(batch).bfloat16()
    expected = torch.nn.functional.cross_entropy(half.double(), batch.targets)
    found = evaluate(lambda one: half, [batch], 3, CPU)
    assert found["nll"] == pytest.approx(float(expected), rel=1e-12)


def test_one_process_keeps_its_buffers():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    agree_on_buffers(Accelerator(cpu=True), norm)
    assert all(torch.equal(before[name], value) for name, value in norm.named_buffers())
