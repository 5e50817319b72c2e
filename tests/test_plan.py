"""plan.py against slow references written here from its documentation, golden values, and statistics."""

import math
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_dist.errors import RecipeError
from kd_dist.plan import Order, Plan, Sequential, mix, permute, shuffle_problem, view_number

WORD = 2**64


# --- References: plain Python integers and lists, one example at a time ---------------------------


def slow_mix(*values):
    state = 0
    for value in values:
        state = ((state ^ (value % WORD)) + 0x9E3779B97F4A7C15) % WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB % WORD
        state ^= state >> 31
    return state


def slow_permute(index, n, key):
    a = math.isqrt(n - 1) + 1
    a += a % 2
    b = math.ceil(n / a)
    key = slow_mix(key)
    while True:
        halves, sizes = [index % a, index // a], [a, b]
        for number in range(24):
            turn, other = number % 2, 1 - number % 2
            # mix adds the Weyl constant itself, so what goes in is one constant short of the word to be scrambled
            word = (key + number * 0x9E3779B97F4A7C15) % WORD ^ halves[other]
            halves[turn] = (halves[turn] + slow_mix(word - 0x9E3779B97F4A7C15) // 256) % sizes[turn]
        index = halves[0] + a * halves[1]
        if index < n:
            return index


def slow_order(order, epoch):
    """The examples and lanes of a whole epoch, by doing to lists what the docstring of Order says."""
    every = list(range(order.examples))
    blocks = [every[start : start + order.block] for start in range(0, order.examples, order.block)]
    lanes = min(order.lanes, len(blocks))
    short = [blocks.pop()] if order.examples % order.block else []
    dealt = [None] * len(blocks)
    for place in range(len(blocks)):
        dealt[place] = blocks[slow_permute(place, len(blocks), slow_mix(0, order.seed, epoch))]
    if short:
        slots = (len(blocks) + 1) // lanes
        dealt.insert(lanes - 1 + lanes * (slow_mix(1, order.seed, epoch) % slots), short[0])
    streams = []
    for lane in range(lanes):
        stream = [example for block in dealt[lane::lanes] for example in block]
        starts = [number * order.window for number in range(max(1, len(stream) // order.window))]
        shuffled = []
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(stream)], strict=True)):
            key = slow_mix(2, order.seed, epoch, lane, number)
            shuffled += [stream[start + slow_permute(i, stop - start, key)] for i in range(stop - start)]
        streams.append(shuffled)
    rounds = range(max(map(len, streams), default=0))
    return [(stream[t], lane) for t in rounds for lane, stream in enumerate(streams) if t < len(stream)]


def whole(order, epoch=0):
    """The example ids of an epoch, in order."""
    return order.at(epoch, np.arange(order.examples))[0]


orders = st.builds(
    Order,
    examples=st.integers(0, 400),
    block=st.integers(1, 50),
    lanes=st.integers(1, 20),
    window=st.integers(1, 120),
    seed=st.integers(-(2**70), 2**70),
)


# --- mix ------------------------------------------------------------------------------------------


def test_mix_is_splitmix64():
    assert int(mix(0)) == 0xE220A8397B1DCDAF  # published first outputs of SplitMix64, seeded with 0 and 1234567
    assert int(mix(1234567)) == 6457827717110365317


@settings(deadline=None)
@given(st.lists(st.integers(-(2**80), 2**80), min_size=1, max_size=5))
def test_mix_equals_the_reference(values):
    assert int(mix(*values)) == slow_mix(*values)


def test_mix_broadcasts_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = mix(-3, np.arange(4)[:, None], np.arange(5), 2**64 - 1)
    assert keys.shape == (4, 5) and keys.dtype == np.uint64
    assert int(keys[2, 3]) == slow_mix(-3, 2, 3, 2**64 - 1)


def test_mix_depends_on_the_order_and_the_number_of_values():
    assert len({int(mix(1, 2)), int(mix(2, 1)), int(mix(1)), int(mix(1, 2, 0)), int(mix(0, 1, 2))}) == 5


# --- permute --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(n=st.integers(1, 700), key=st.integers(0, WORD - 1))
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    assert sorted(image.tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))), st.integers(0, WORD - 1))
def test_permute_equals_the_reference(index_and_n, key):
    index, n = index_and_n
    assert permute(index, n, key) == slow_permute(index, n, key)


@pytest.mark.parametrize("n", [2**40, 2**40 - 1, 2**40 - 2**20, (2**20 - 1) ** 2, (2**20 - 1) ** 2 + 1])
def test_permute_near_its_largest_size(n):
    index = np.concatenate([np.arange(2000), np.arange(n - 2000, n)])
    image = permute(index, n, 7)
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)
    assert image[-1] == slow_permute(n - 1, n, 7)


def test_permute_takes_sizes_and_keys_per_element():
    n, key = np.arange(1, 50), mix(np.arange(49))
    mixed = permute(n // 2, n, key)
    assert mixed.tolist() == [int(permute(size // 2, size, one)) for size, one in zip(n, key, strict=True)]
    table = permute(np.arange(3)[:, None], 3, np.arange(5))
    assert table.shape == (3, 5) and (np.sort(table, axis=0) == np.arange(3)[:, None]).all()
    assert permute(np.empty(0, np.int64), 0, 1).shape == (0,)


@pytest.mark.parametrize(("index", "n"), [(-1, 5), (5, 5), (0, 0), (0, 2**40 + 1), ([0, 3], [9, 3])])
def test_permute_refuses_what_it_cannot_do(index, n):
    with pytest.raises(ValueError, match=r"index must be in range\(n\), and n at most 2\*\*40"):
        permute(index, n, 1)


def excess(counts):
    """Chi-square against equal counts, in standard deviations above its mean. Keys are fixed, so nothing is flaky."""
    expected = counts.sum() / counts.size
    return (((counts - expected) ** 2 / expected).sum() - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


def pair_counts(first, second, n):
    """How often each of the n * (n - 1) pairs of different images occurs."""
    return np.bincount(first * n + second, minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]


@pytest.mark.parametrize("n", range(2, 9))
def test_every_permutation_of_a_small_range_is_equally_likely(n):
    keys = np.arange(max(20_000, 5 * math.factorial(n)))
    code = np.zeros(len(keys), np.int64)
    for index in range(n):
        image = permute(index, n, keys)
        assert excess(np.bincount(image, minlength=n)) < 4
        code = code * n + image
    kinds, counts = np.unique(code, return_counts=True)
    counts = np.concatenate([counts, np.zeros(math.factorial(n) - len(kinds))])
    assert excess(counts) < 4


@pytest.mark.parametrize("n", [97, 100, 101])
def test_every_pair_of_images_is_equally_likely(n):
    keys = np.arange(100_000)
    images = [permute(index, n, keys) for index in (0, 1, 10, n - 1)]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert len(pairs) == 6
    for i, j in pairs:
        assert excess(pair_counts(images[i], images[j], n)) < 4


def test_the_statistic_sees_a_poor_permutation():
    shift = permute(0, 100, np.arange(100_000))  # a keyed rotation: every position is uniform, no pair is
    assert excess(np.bincount(shift, minlength=100)) < 4
    assert excess(pair_counts(shift, (shift + 1) % 100, 100)) > 100


# --- Order ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_order_equals_the_reference(order, epoch):
    ids, lanes = order.at(epoch, np.arange(order.examples))
    assert ids.dtype == np.int64 and lanes.dtype == np.int64
    assert list(zip(ids.tolist(), lanes.tolist(), strict=True)) == slow_order(order, epoch)


@settings(max_examples=300, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_order_is_a_permutation_of_the_examples(order, epoch):
    assert sorted(whole(order, epoch).tolist()) == list(range(order.examples))


@settings(deadline=None)
@given(order=orders, epoch=st.integers(0, 9), data=st.data())
def test_positions_may_be_asked_in_any_order_and_alone(order, epoch, data):
    if order.examples == 0:
        assert len(order.at(epoch, [])[0]) == 0
        return
    some = data.draw(st.lists(st.integers(0, order.examples - 1), max_size=20))
    assert order.at(epoch, some)[0].tolist() == whole(order, epoch)[some].tolist()


def test_tiny_orders():
    assert whole(Order(0, 4, 4, 4, 0)).tolist() == []
    assert whole(Order(1, 4, 4, 4, 0)).tolist() == [0]
    firsts = {int(whole(Order(2, 1, 64, 256, 0), epoch)[0]) for epoch in range(20)}
    assert firsts == {0, 1}


GOLDEN = [
    (Order(1, 1, 1, 1, 0), 0, [0]),
    (Order(10, 1, 64, 256, 0), 0, [1, 2, 4, 0, 5, 9, 8, 7, 3, 6]),
    (Order(10, 1, 64, 256, 0), 1, [2, 9, 5, 6, 1, 7, 4, 8, 3, 0]),
    (Order(20, 3, 2, 6, 7), 3, [3, 1, 5, 0, 9, 19, 11, 2, 4, 15, 10, 17, 7, 16, 14, 18, 13, 6, 12, 8]),
    (Order(16, 4, 4, 4, -1), 0, [15, 0, 6, 8, 13, 3, 4, 9, 12, 1, 7, 10, 14, 2, 5, 11]),
    (
        Order(25, 4, 3, 5, 2**63),
        12,
        [0, 23, 6, 8, 22, 24, 9, 15, 5, 10, 12, 4, 11, 20, 7, 18, 14, 2, 13, 16, 21, 19, 3, 1, 17],
    ),
]


@pytest.mark.parametrize(("order", "epoch", "ids"), GOLDEN)
def test_golden_orders(order, epoch, ids):
    """A change here changes the data order of every run ever made: do not mend the values, mend the code."""
    assert whole(order, epoch).tolist() == ids


def test_golden_positions_of_a_large_order():
    order = Order.default(10**9, 10_000, seed=1)
    ids, lanes = order.at(2, [0, 1, 499_999_999, 999_999_998, 999_999_999])
    assert ids.tolist() == [500492600, 770638610, 178815239, 178769901, 255528974]
    assert lanes.tolist() == [0, 1, 63, 33, 34]


def test_seed_and_epoch_each_give_another_order():
    order, other = Order(1000, 8, 4, 64, 0), Order(1000, 8, 4, 64, 1)
    ids = [whole(order, 0), whole(order, 1), whole(other, 0), whole(other, 1)]
    for i in range(4):
        for j in range(i):
            assert np.mean(ids[i] == ids[j]) < 0.02


def test_every_example_is_equally_likely_at_every_position_when_blocks_are_single():
    epochs, n = 3000, 7
    order = Order(n, 1, 3, 2, 5)
    ids = np.array([whole(order, epoch) for epoch in range(epochs)])
    for position in range(n):
        assert excess(np.bincount(ids[:, position], minlength=n)) < 4


def test_a_round_takes_one_example_of_each_active_lane():
    lanes = Order(103, 10, 4, 15, 0).locate(0, np.arange(103))[0]
    # 11 blocks in 4 lanes: 30, 30, 30 and, with the short block of 3, 13 examples
    assert lanes.tolist() == [0, 1, 2, 3] * 13 + [0, 1, 2] * 17
    lanes = Order(100, 10, 4, 15, 0).locate(0, np.arange(100))[0]
    assert lanes.tolist() == [0, 1, 2, 3] * 20 + [0, 1] * 10


def test_a_billion_examples_take_no_memory():
    tracemalloc.start()
    try:
        order = Order.default(10**9, 10_000, seed=1)
        plan = Plan(order, 1024, 8, 1)
        ids = plan.share(plan.steps_per_epoch * 3 - 2, 7, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(ids) == 128
    assert peak < 2**20


@pytest.mark.parametrize("order", [Order(10, 2, 2, 2, 0), Sequential(10), Order(0, 1, 1, 1, 0), Sequential(0)])
@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_the_epoch_is_an_error(order, position):
    with pytest.raises(IndexError, match=rf"a position is outside range\({order.examples}\)"):
        order.at(0, [position])


@pytest.mark.parametrize("name", ["block", "lanes", "window"])
def test_order_refuses_sizes_below_one(name):
    sizes = {"block": 1, "lanes": 1, "window": 1, name: 0}
    with pytest.raises(RecipeError, match=rf"data\.{name} must be at least 1, not 0; correct it in the recipe"):
        Order(examples=10, seed=0, **sizes)


def test_order_refuses_a_negative_number_of_examples():
    with pytest.raises(RecipeError, match="order: the number of examples cannot be -1; pack the data again"):
        Order(-1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("examples", "example_bytes", "given", "wanted"),
    [
        (10**6, 10_000, {}, (26, 64, 26 * 256)),  # 256 KiB holds 26 examples
        (20_000, 10_000, {}, (4, 64, 4 * 256)),  # 4096 blocks are worth more than large ones
        (8191, 10_000, {}, (1, 64, 256)),
        (1797, 300, {}, (1, 64, 256)),
        (10**6, 10**6, {}, (1, 64, 256)),  # one example is more than 256 KiB
        (0, 0, {}, (1, 64, 256)),
        (10**6, 10_000, {"block": 8}, (8, 64, 2048)),
        (10**6, 10_000, {"lanes": 2, "window": 99}, (26, 2, 99)),
    ],
)
def test_default_order(examples, example_bytes, given, wanted):
    order = Order.default(examples, example_bytes, 3, **given)
    assert (order.block, order.lanes, order.window) == wanted
    assert (order.examples, order.seed) == (examples, 3)


def test_default_refuses_zero_rather_than_taking_it_for_unset():
    with pytest.raises(RecipeError, match=r"data\.lanes must be at least 1, not 0"):
        Order.default(10, 10, 0, lanes=0)


def test_blocks_in_play():
    assert Order.default(10**9, 10_000, 0).blocks_in_play == 64 * 256
    assert Order(1000, 10, 4, 25, 0).blocks_in_play == 10
    assert Order(1000, 10, 4, 10**6, 0).blocks_in_play == 100  # no more than there are
    assert Order(0, 10, 4, 25, 0).blocks_in_play == 0


def test_plan_needs_no_torch():
    code = "import sys, kd_dist.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Quality of the shuffle -----------------------------------------------------------------------


def test_too_few_blocks_in_play_are_refused():
    message = (
        r"data: lanes 4 x window 16 / block 8 keep 8\.0 blocks in play, fewer than the 10 examples of a global batch; "
        r"set data\.window to 80 or more, or make data\.block smaller"
    )
    with pytest.raises(RecipeError, match=message):
        shuffle_problem(Order(10_000, 8, 4, 16, 0), 10)


def test_few_blocks_in_play_are_worth_a_warning():
    assert shuffle_problem(Order(10_000, 8, 4, 16, 0), 8) == (
        "data: lanes 4 x window 16 / block 8 keep 8.0 blocks in play, less than 4 times the 8 examples of a global "
        "batch, a poor shuffle; set data.window to 64 or more, or make data.block smaller"
    )
    assert shuffle_problem(Order(10_000, 8, 4, 16, 0), 2) is None


def test_an_ideal_shuffle_is_never_a_problem():
    assert shuffle_problem(Order(64, 8, 4, 16, 0), 60) is None  # all examples are in play
    assert shuffle_problem(Order(10_000, 8, 4, 16, 0), 10_000) is None  # every batch is all examples
    assert shuffle_problem(Order.default(1797, 300, 0), 1024) is None
    assert shuffle_problem(Order.default(0, 0, 0), 32) is None


@settings(deadline=None)
@given(
    st.builds(Order, st.integers(1, 5000), st.integers(1, 50), st.integers(1, 20), st.integers(1, 300), st.just(0)),
    st.integers(1, 600),
)
def test_the_window_that_the_sentence_asks_for_is_enough(order, batch_size):
    try:
        sentence = shuffle_problem(order, batch_size)
    except RecipeError as error:
        sentence = str(error)
    if sentence is not None:
        window = int(sentence.split("data.window to ")[1].split()[0])
        assert window > order.window
        assert shuffle_problem(Order(order.examples, order.block, order.lanes, window, 0), batch_size) is None


def class_spread(ids, classes, batch_size):
    """Standard deviation over batches of a class's share of the batch, averaged over classes."""
    batches = classes[ids[: len(ids) // batch_size * batch_size]].reshape(-1, batch_size)
    return np.mean([(batches == one).mean(axis=1).std() for one in np.unique(classes)])


@pytest.mark.parametrize(("ratio", "low", "high"), [(4, 0.97, 1.15), (1, 1.25, 1.45)])
def test_batches_are_as_mixed_as_shuffle_problem_says(ratio, low, high):
    """Blocks of one class each are the worst case. The second row shows that the statistic sees a poor shuffle."""
    block, lanes, batch_size = 16, 64, 256
    examples = block * batch_size * 32 + 5
    random = np.random.default_rng(0)
    classes = np.repeat(random.integers(0, 10, examples // block + 1), block)[:examples]
    ideal = np.mean([class_spread(random.permutation(examples), classes, batch_size) for _ in range(4)])
    order = Order(examples, block, lanes, ratio * batch_size * block // lanes, seed=0)
    assert order.blocks_in_play == ratio * batch_size
    ours = np.mean([class_spread(whole(order, epoch), classes, batch_size) for epoch in range(2)])
    assert low < ours / ideal < high


def test_the_end_of_an_epoch_is_as_mixed_as_the_rest():
    """A last window of one block in each lane would fill the last batches from no more blocks than there are lanes."""
    order = Order(4 * 8 * (64 + 1), 8, 4, 8 * 64, 0)  # 65 blocks in each lane, 64 in a window
    last = whole(order)[-32:] // 8
    assert len(np.unique(last)) > 24


# --- Sequential -----------------------------------------------------------------------------------


def test_sequential_is_the_identity():
    for epoch in (0, 5):
        ids, lanes = Sequential(10).at(epoch, [3, 9, 0])
        assert ids.tolist() == [3, 9, 0] and lanes.tolist() == [0, 0, 0]
    assert Sequential(0).at(0, [])[0].tolist() == []
    assert Plan(Sequential(10), 4, 2, 1).share(2, 1, 0).tolist() == [9]


# --- Plan -----------------------------------------------------------------------------------------


def step_of(plan, step):
    """The shares of a step, end to end."""
    shares = [plan.share(step, rank, micro) for micro in range(plan.accumulate) for rank in range(plan.world)]
    return np.concatenate(shares).tolist()


@settings(max_examples=60, deadline=None)
@given(
    order=orders.filter(lambda order: order.examples > 0),
    batch_size=st.integers(1, 130),
    world=st.integers(1, 9),
    accumulate=st.integers(1, 4),
    step=st.integers(0, 10_000),
)
def test_every_topology_takes_the_same_steps(order, batch_size, world, accumulate, step):
    plan, alone = Plan(order, batch_size, world, accumulate), Plan(order, batch_size, 1, 1)
    ids = step_of(plan, step)
    assert ids == alone.share(step, 0, 0).tolist()
    assert len(ids) == plan.total(step) == alone.total(step)
    assert plan.steps_per_epoch == alone.steps_per_epoch
    sizes = [len(plan.share(step, rank, micro)) for rank in range(world) for micro in range(accumulate)]
    assert max(sizes) - min(sizes) <= 1
    one = Plan(order, batch_size, 1, accumulate)
    for micro in range(accumulate):
        together = np.concatenate([plan.share(step, rank, micro) for rank in range(world)])
        assert together.tolist() == one.share(step, 0, micro).tolist()


@settings(max_examples=30, deadline=None)
@given(
    order=orders.filter(lambda order: order.examples > 0),
    batch_size=st.integers(20, 130),
    world=st.integers(1, 5),
    epoch=st.integers(0, 50),
)
def test_an_epoch_delivers_every_example_once(order, batch_size, world, epoch):
    plan = Plan(order, batch_size, world, 2)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    assert sorted(example for step in steps for example in step_of(plan, step)) == list(range(order.examples))
    assert sum(plan.total(step) for step in steps) == order.examples


def test_a_step_is_its_run_of_positions_sorted_by_lane():
    order = Order(100, 3, 4, 12, 0)
    plan = Plan(order, 30, 1, 1)
    assert plan.steps_per_epoch == 4 and plan.total(3) == 10
    for step, epoch, run in [(0, 0, range(30)), (3, 0, range(90, 100)), (6, 1, range(60, 90)), (7, 1, range(90, 100))]:
        ids, lanes = order.at(epoch, list(run))
        by_lane = [int(one) for lane in range(4) for one in ids[lanes == lane]]
        assert plan.share(step, 0, 0).tolist() == by_lane
        assert plan.step_examples(step).tolist() == ids.tolist()


def test_4096_ranks_with_16_workers_deliver_every_example_once():
    """Worker k of a rank serves the steps that are k modulo 16, and nobody knows of anybody else."""
    ranks, workers, batch_size = 4096, 16, 101
    order = Order.default(batch_size * 16 + 7, 10_000, seed=0)
    seen, calls = np.zeros(order.examples, np.int64), 0
    for rank in range(ranks):
        for worker in range(workers):
            plan = Plan(order, batch_size, ranks, 1)
            for step in range(plan.steps_per_epoch + worker, 2 * plan.steps_per_epoch, workers):
                np.add.at(seen, plan.share(step, rank, 0), 1)
                calls += 1
    assert calls == ranks * 17
    assert (seen == 1).all()


@pytest.mark.slow
def test_4096_busy_ranks_share_a_step():
    plan = Plan(Order.default(10**9, 10_000, seed=0), 10_000, 4096, 1)
    shares = [plan.share(99, rank, 0) for rank in range(4096)]
    assert {len(share) for share in shares} == {2, 3}
    assert np.concatenate(shares).tolist() == Plan(plan.order, 10_000, 1, 1).share(99, 0, 0).tolist()


def test_ranks_read_different_blocks():
    """With whole lanes to each rank, no block is read by two of them."""
    order = Order(64 * 40 * 10, 10, 64, 400, 0)  # 64 lanes of 40 blocks
    plan = Plan(order, 128, 8, 1)
    steps = range(plan.steps_per_epoch)
    blocks = [{int(one) // 10 for step in steps for one in plan.share(step, rank, 0)} for rank in range(8)]
    assert [len(one) for one in blocks] == [320] * 8
    assert len(set().union(*blocks)) == 2560


def test_a_rank_has_few_blocks_open():
    """Its 8 lanes have a window of 16 blocks each; positions dealt out without regard to lanes would touch them all."""
    order = Order(64 * 64 * 10, 10, 64, 160, 0)
    plan = Plan(order, 128, 8, 1)
    steps_of_a_window = 160 * 64 // 128
    touched = {int(one) // 10 for step in range(steps_of_a_window) for one in plan.share(step, 3, 0)}
    assert len(touched) == 8 * 16


@settings(max_examples=60, deadline=None)
@given(
    order=orders.filter(lambda order: order.examples > 0),
    batch_size=st.integers(1, 130),
    world=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    repeats=st.integers(1, 6),
    step=st.integers(0, 10_000),
)
def test_a_round_passes_the_examples_once_each_of_them_side_by_side(
    order, batch_size, world, accumulate, repeats, step
):
    """Against the whole round, written out."""
    plan = Plan(order, batch_size, world, accumulate, repeats)
    assert plan.steps_per_epoch == Plan(order, batch_size, 1, 1).steps_per_epoch
    epoch, place = divmod(step, plan.steps_per_epoch)
    ids, lanes = order.at(epoch // repeats, np.arange(order.examples))
    round_of_rows = [
        (lane, one, epoch // repeats * repeats + again)
        for one, lane in zip(ids.tolist(), lanes.tolist(), strict=True)
        for again in range(repeats)
    ]
    own = round_of_rows[epoch % repeats * order.examples :][: order.examples]
    run = own[place * batch_size :][:batch_size]
    assert plan.total(step) == len(run) and plan.step_examples(step).tolist() == [one for _, one, _ in run]
    by_lane = [(one, use) for _, one, use in sorted(run, key=lambda row: row[0])]
    shares = [plan.uses(step, rank, micro) for micro in range(accumulate) for rank in range(world)]
    assert [(int(one), int(use)) for both in shares for one, use in zip(*both, strict=True)] == by_lane
    assert {both[1].dtype for both in shares} == {np.dtype(np.int64)}
    groups = 1 + np.count_nonzero(np.diff([one for one, _ in by_lane]))
    assert groups == len({one for one, _ in by_lane})  # neighbours, of one decode
    assert groups <= -(-len(run) // repeats) + 1  # one more where a group lies on the border of the step


@settings(max_examples=20, deadline=None)
@given(
    order=orders.filter(lambda order: order.examples > 0),
    batch_size=st.integers(20, 130),
    repeats=st.integers(1, 6),
    rounds=st.integers(0, 20),
    views=st.integers(1, 9),
)
def test_a_round_shows_the_views_that_as_many_plain_epochs_show(order, batch_size, repeats, rounds, views):
    shown = []
    for plan in (Plan(order, batch_size, 2, 1, repeats), Plan(order, batch_size, 2, 1)):
        first = rounds * repeats * plan.steps_per_epoch
        parts = [
            plan.uses(step, rank, 0) for step in range(first, first + repeats * plan.steps_per_epoch) for rank in (0, 1)
        ]
        ids, uses = (np.concatenate(part) for part in zip(*parts, strict=True))
        shown.append(sorted(zip(ids.tolist(), uses.tolist(), view_number(ids, uses, views, 3).tolist(), strict=True)))
    assert shown[0] == shown[1] and len(set(shown[0])) == repeats * order.examples
    if repeats <= views and not views % repeats:  # a group lies in one cycle of the views
        assert len({(one, view) for one, _, view in shown[0]}) == len(shown[0])


def test_a_step_of_repeats_costs_no_more_at_the_end_of_a_run():
    plan = Plan(Order.default(10**9, 10_000, seed=0), 1024, 4096, 1, 4)
    last = 4 * 25 * plan.steps_per_epoch - 1
    assert plan.total(last) == 10**9 % 1024 and plan.uses(last, 4095, 0)[1].tolist() == [99]


@pytest.mark.parametrize("name", ["batch_size", "world", "accumulate", "repeats"])
def test_plan_refuses_sizes_below_one(name):
    sizes = {"batch_size": 4, "world": 1, "accumulate": 1, "repeats": 1, name: 0}
    with pytest.raises(RecipeError, match=f"{name} must be at least 1, not 0"):
        Plan(Sequential(10), **sizes)


@pytest.mark.parametrize("order", [Sequential(0), Order(0, 1, 1, 1, 0)])
def test_plan_refuses_an_empty_split(order):
    with pytest.raises(RecipeError, match=r"plan: the split holds no examples; give it a share in data\.splits"):
        Plan(order, 4, 1, 1)


def test_plan_refuses_steps_and_shares_that_do_not_exist():
    plan = Plan(Sequential(10), 4, 2, 3)
    with pytest.raises(IndexError, match="there is no step -1"):
        plan.share(-1, 0, 0)
    with pytest.raises(IndexError, match="there is no step -2"):
        plan.total(-2)
    for rank, micro in [(-1, 0), (2, 0), (0, -1), (0, 3)]:
        with pytest.raises(IndexError, match=f"plan: no rank {rank} of 2, micro-batch {micro} of 3"):
            plan.share(0, rank, micro)


# --- view_number ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(views=st.integers(1, 12), cycle=st.integers(0, 20), seed=st.integers(-(2**70), 2**70))
def test_each_cycle_shows_every_view_once(views, cycle, seed):
    numbers = [view_number(np.arange(30), cycle * views + turn, views, seed) for turn in range(views)]
    assert numbers[0].dtype == np.int64
    assert (np.sort(np.stack(numbers), axis=0) == np.arange(views)[:, None]).all()


def test_examples_cycles_and_seeds_have_orders_of_their_own():
    many = np.arange(10_000)
    for epoch in (0, 3, 8):
        numbers = view_number(many, epoch, 8, 0)
        assert excess(np.bincount(numbers, minlength=8)) < 4
        for other in (view_number(many, epoch + 8, 8, 0), view_number(many, epoch, 8, 1)):
            assert abs(np.mean(numbers == other) - 1 / 8) < 0.02


@given(views=st.integers(1, 12), uses=st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_each_example_has_been_shown_as_often_as_it_has(views, uses):
    alone = [int(view_number([7 * row], use, views, 0)[0]) for row, use in enumerate(uses)]
    assert view_number(7 * np.arange(len(uses)), np.array(uses), views, 0).tolist() == alone


def test_golden_views():
    assert view_number(np.arange(12), 5, 8, 0).tolist() == [3, 0, 5, 1, 6, 5, 2, 0, 6, 6, 5, 7]
    assert view_number([10**9, 3], 17, 50, 42).tolist() == [29, 36]


def test_no_views_is_an_error():
    with pytest.raises(RecipeError, match=r"views\.count must be at least 1, not 0"):
        view_number([1], 0, 0, 0)
