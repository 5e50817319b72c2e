"""Metrics over a split: the same however it is cut into batches, and no row counts twice."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from kd_dist import assemble
from kd_dist.batch import Batch
from kd_dist.data import read_examples
from kd_dist.errors import DataError
from kd_dist.evaluation import agree_on_buffers, evaluate
from kd_dist.loader import batches
from kd_dist.plan import Plan, Sequential
from kd_dist.tasks import Classification

CPU = torch.device("cpu")
TASK = Classification(3)


def predict(batch: Batch) -> torch.Tensor:
    """Some logits (B, 3) from the pixels, right more often than not."""
    return batch.images.float().mean(dim=(2, 3)).flip(1) / 16


def share(recipe, split: str, batch_size: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """All batches of a rank when `batch_size` examples make a step."""
    corridor = assemble.evaluation_corridor(recipe, split, rank, world, cached=False)
    plan = Plan(Sequential(len(corridor.examples)), batch_size, world, 1)
    corridor = dataclasses.replace(corridor, plan=plan)
    return list(batches(corridor, 0, len(corridor), 0, pin=False))


def evaluated(recipe, split: str, batch_size: int) -> dict[str, float]:
    return evaluate(predict, share(recipe, split, batch_size), TASK, CPU)


def by_hand(recipe, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Targets and logits of a split, each example decoded and fed by itself."""
    corridor = assemble.evaluation_corridor(recipe, split, 0, 1, cached=False)
    examples = read_examples(corridor.examples, np.arange(len(corridor.examples)), corridor.task.decode)
    logits = torch.cat([predict(batch) for batch in share(recipe, split, 1)])
    return np.array([example.target for example in examples]), logits.numpy()


def test_a_split_agrees_with_scikit_learn(packed):
    targets, logits = by_hand(packed, "train")
    found = evaluated(packed, "train", 8)
    p = torch.from_numpy(logits).double().softmax(1).numpy()
    assert 20 < len(targets) < 40
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)), abs=1e-7)
    assert found["accuracy"] > 0.5
    assert found["nll"] == pytest.approx(log_loss(targets, p, labels=range(3)), rel=1e-12)


def test_the_size_of_a_batch_changes_nothing(packed):
    results = [evaluated(packed, "train", size) for size in (1, 3, 7, 8, 1000)]
    for other in results[1:]:
        assert other["accuracy"] == results[0]["accuracy"]
        assert other["nll"] == pytest.approx(results[0]["nll"], rel=1e-13)


def test_ranks_and_their_empty_shares_add_up_to_the_whole(packed):
    """5 ranks over batches of 4: in every step at least one has only a filler row, which must not count."""
    targets, _ = by_hand(packed, "val")
    shares = [share(packed, "val", 4, rank, 5) for rank in range(5)]
    rows = [sum(int(batch.valid.sum()) for batch in one) for one in shares]
    right = [
        evaluate(predict, one, TASK, CPU)["accuracy"] * count for one, count in zip(shares, rows, strict=True) if count
    ]
    assert all(len(one) == len(shares[0]) for one in shares)
    assert sum(not batch.valid.any() for one in shares for batch in one) >= len(shares[0])
    assert sum(rows) == len(targets)
    whole = evaluated(packed, "val", 8)
    assert sum(right) / len(targets) == pytest.approx(whole["accuracy"], abs=1e-6)


def test_a_filler_row_is_not_counted(packed):
    [batch] = share(packed, "val", 100)
    # A filler that would be wrong: another class than its pixels show, in its own batch.
    wrong, none = (batch.targets[:1] + 1) % 3, torch.zeros(1, dtype=torch.bool)
    filler = Batch(batch.keys[:1], batch.images[:1], wrong, None, none, 1, None)
    assert evaluate(predict, [batch, filler], TASK, CPU) == evaluate(predict, [batch], TASK, CPU)
    last = torch.arange(len(batch.valid)) == len(batch.valid) - 1
    without = Batch(batch.keys[:-1], batch.images[:-1], batch.targets[:-1], None, batch.valid[:-1], 1, None)
    assert evaluate(predict, [batch._replace(valid=~last)], TASK, CPU) == evaluate(predict, [without], TASK, CPU)


def test_failed_examples_are_left_out_with_a_warning_up_to_a_limit(packed, capsys):
    [batch] = share(packed, "val", 100)
    last = torch.arange(len(batch.valid)) == len(batch.valid) - 1
    without = Batch(batch.keys[:-1], batch.images[:-1], batch.targets[:-1], None, batch.valid[:-1], 1, None)
    filler = batch._replace(valid=torch.zeros_like(batch.valid), failed=("x: second", "x: third"))
    failing = [batch._replace(valid=~last, failed=("x.tar: example 'a' is masked: it is damaged",)), filler]
    expected = evaluate(predict, [without], TASK, CPU)
    assert capsys.readouterr().err == ""
    for limit in (None, 3):
        assert evaluate(predict, failing, TASK, CPU, limit) == expected
        first = "x.tar: example 'a' is masked: it is damaged"
        assert capsys.readouterr().err == f"warning: the metrics leave out 3 examples; the first: {first}\n"
    with pytest.raises(DataError, match="^3 examples failed, data.error_limit allows 2; the first: x.tar: example 'a'"):
        evaluate(predict, failing, TASK, CPU, 2)


def test_nothing_is_recorded_for_a_gradient(packed):
    head = nn.Linear(3, 3)
    seen = []

    def with_head(batch: Batch) -> torch.Tensor:
        seen.append(head(predict(batch)))
        return seen[-1]

    evaluate(with_head, share(packed, "val", 4), TASK, CPU)
    assert seen and not any(logits.requires_grad for logits in seen)


def test_half_precision_logits_are_measured_in_full(packed):
    [batch] = share(packed, "val", 100)
    half = predict(batch).bfloat16()
    expected = torch.nn.functional.cross_entropy(half.double(), batch.targets)
    found = evaluate(lambda one: half, [batch], TASK, CPU)
    assert found["nll"] == pytest.approx(float(expected), rel=1e-12)


def test_one_process_keeps_its_buffers():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    agree_on_buffers(Accelerator(cpu=True), norm)
    assert all(torch.equal(before[name], value) for name, value in norm.named_buffers())
