"""Which example, in which view, goes to which rank at which step: arithmetic on integers, no torch, no files.

`Order` puts the examples of a split into one order per epoch, which depends on the data, the seed and the epoch alone.
`Plan` cuts that order into steps and shares. Nothing here holds a list of all examples: any step of any epoch costs the
same. All randomness comes from `mix` and `permute` below, never from a library whose stream may change.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kd_dist.errors import RecipeError

_LARGEST = 2**40  # permute stays clear of 64-bit overflow and of inexact square roots up to here
_WEYL = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
# 24 rounds. Measured by chi-square over a million keys: all n! permutations are equally frequent for n = 2 to 8, and so
# are all pairs of images for n up to 100. 16 rounds still fail on pairs at n = 5 to 8; from n = 50 on, 8 would do.
_ROUNDS = np.array([number * _WEYL % 2**64 for number in range(24)], np.uint64).reshape(-1, 2, 1)
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31, 8))  # a scalar that is made in each round would take longer
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # than what is done with it
_BLOCKS, _PLACE, _WINDOWS, _VIEWS = range(4)  # what a key is for, so that no two purposes share one


def _scramble(state: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words."""
    state = state ^ (state >> _SHIFTS[0])
    state *= _FACTORS[0]
    state ^= state >> _SHIFTS[1]
    state *= _FACTORS[1]
    state ^= state >> _SHIFTS[2]
    return state


def mix(*values: ArrayLike) -> np.ndarray | np.uint64:
    """A 64-bit key from integers, each a scalar or an array; arrays broadcast, and the order of the values matters.

    Integers count modulo 2**64, so negative ones are welcome. `mix(0)` is the first output of SplitMix64 seeded with 0.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # wrapping is meant, and numpy warns about it for scalars only
        for value in values:
            word = np.asarray(value % 2**64 if isinstance(value, int) else value).astype(np.uint64)
            state = _scramble((state ^ word) + np.uint64(_WEYL))
    return state


def permute(index: ArrayLike, n: ArrayLike, key: ArrayLike) -> np.ndarray:
    """Where a keyed permutation of range(n) sends `index`: int64, the broadcast shape of the three arguments.

    Each element may have its own n (1 to 2**40) and its own key. A bijection of range(n) for every key, and close to a
    uniform choice among all n! over keys, for small n too. An index outside range(n) is a ValueError.

    A Feistel network over pairs (x, y), 0 <= x < a, 0 <= y < b, a*b >= n: the halves take turns, and one is shifted by
    a hash of the other (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). What lands at n or beyond
    goes in again until it falls inside.
    """
    index, n, key = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(n, np.int64), mix(key))
    if ((index < 0) | (index >= n) | (n > _LARGEST)).any():
        raise ValueError("permute: every index must be in range(n), and n at most 2**40")
    shape, key = index.shape, key.ravel()
    index, n = index.ravel().astype(np.uint64), n.ravel().astype(np.uint64)
    a = np.ceil(np.sqrt(n)).astype(np.uint64)
    a += a & np.uint64(1)  # with a and b odd, all shifts are even permutations: no odd one would ever occur
    b = (n + a - np.uint64(1)) // a
    image = _feistel(index, a, b, key)
    while (outside := image >= n).any():
        image[outside] = _feistel(image[outside], a[outside], b[outside], key[outside])
    return image.astype(np.int64).reshape(shape)[()]


def _feistel(index: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of range(a*b). All arguments (K,) uint64."""
    y, x = np.divmod(index, a)
    for first, second in key + _ROUNDS:
        # A hash loses its low byte so that adding it to a half cannot wrap: a wrapped sum would not be a bijection.
        x = (x + (_scramble(first ^ y) >> _SHIFTS[3])) % a
        y = (y + (_scramble(second ^ x) >> _SHIFTS[3])) % b
    return x + a * y


@dataclass(frozen=True)
class Order:
    """One order of all examples for each epoch: well shuffled, yet read in blocks of neighbours.

    range(examples), all shards end to end, is cut into blocks of neighbours. The blocks are permuted and dealt like
    cards into lanes; a lane is the stream of its blocks. Within a lane, windows of the stream are permuted. Round t of
    the epoch takes one example from every lane longer than t. So about `blocks_in_play` blocks are mixed at any time.
    """

    examples: int  # N, of the split
    block: int  # examples of one block; the last block may be shorter
    lanes: int  # streams that are read side by side; no more than there are blocks are used
    window: int  # examples of a lane that are permuted together; in a lane's last window, up to twice as many less one
    seed: int

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise RecipeError(f"order: the number of examples cannot be {self.examples}; pack the data again")
        for name in ("block", "lanes", "window"):
            _check_positive(f"data.{name}", getattr(self, name))

    @classmethod
    def default(
        cls,
        examples: int,
        example_bytes: int,
        seed: int,
        block: int | None = None,
        lanes: int | None = None,
        window: int | None = None,
    ) -> "Order":
        """The order for `examples` of about `example_bytes` bytes each; what is not None is taken as it is.

        A block is 256 KiB, which a disk reads about as fast as a stream, but there are at least 4096 of them if
        possible. 64 lanes with windows of 256 blocks keep 16384 blocks in play.
        """
        if block is None:
            block = max(1, min(2**18 // max(1, example_bytes), examples // 4096))
        lanes = 64 if lanes is None else lanes
        window = 256 * block if window is None else window
        return cls(examples, block, lanes, window, seed)

    @property
    def blocks(self) -> int:
        """How many blocks there are, a shorter last one included."""
        return -(-self.examples // self.block)

    @property
    def lanes_used(self) -> int:
        """How many lanes hold at least one block."""
        return min(self.lanes, self.blocks)

    @property
    def blocks_in_play(self) -> float:
        """About how many blocks a run of positions is drawn from: lanes * window / block, or all there are."""
        return min(self.blocks, self.lanes_used * self.window / self.block)

    def locate(self, epoch: int, positions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Where each position (P,) of the epoch is taken from: its lane (P,) and its offset in that lane, both int64.

        The same in every epoch. A position outside range(examples) is an IndexError.
        """
        positions = _checked_positions(positions, self.examples)
        lanes = self.lanes_used
        if not lanes:
            return positions, positions
        # The first `longer` lanes hold one block more than the others, and the short block is always dealt to the last
        # lane. So lengths never increase with the lane number, and the lanes still active in a round are 0, 1, ...
        fewest, longer = divmod(self.blocks, lanes)
        missing = self.blocks * self.block - self.examples
        rounds = np.array([0, fewest * self.block - missing, fewest * self.block])  # in which the active lanes change
        active = np.array([lanes, lanes - 1, longer])  # how many are active from there on
        starts = np.concatenate([[0], np.cumsum(np.diff(rounds) * active[:2])])  # the first position of these rounds
        part = np.searchsorted(starts, positions, side="right") - 1
        offset, lane = np.divmod(positions - starts[part], active[part])
        return lane, offset + rounds[part]

    def at(self, epoch: int, positions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The example at each position (P,) of the epoch and the lane it comes from: (P,) int64 both.

        Over all positions, every example occurs once. A position outside range(examples) is an IndexError.
        """
        lane, offset = self.locate(epoch, positions)
        if not len(lane):
            return lane, lane
        offset = self._shuffled(epoch, lane, offset)
        lanes, last = self.lanes_used, self.lanes_used - 1
        full, short = divmod(self.examples, self.block)
        if short:
            # The short block stands at one of the last lane's slots. What follows it there moves up to a block border.
            slot = int(mix(_PLACE, self.seed, epoch)) % (self.blocks // lanes)
            offset = offset + np.where((lane == last) & (offset >= slot * self.block + short), self.block - short, 0)
            place = last + lanes * slot
        else:
            place = self.blocks
        number = lane + lanes * (offset // self.block)  # of the block, in the order in which blocks are dealt
        block = np.full(number.shape, full)
        whole = number != place
        number = number[whole]
        block[whole] = permute(number - (number > place), full, mix(_BLOCKS, self.seed, epoch))
        return block * self.block + offset % self.block, lane

    def _shuffled(self, epoch: int, lane: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """The offset in each lane's stream that takes the place of `offset` once the windows are permuted."""
        lanes = self.lanes_used
        missing = self.blocks * self.block - self.examples
        length = (self.blocks - lane + lanes - 1) // lanes * self.block - np.where(lane == lanes - 1, missing, 0)
        # What is left at the end of a lane joins the last window: alone, it might be far fewer blocks than a window.
        windows = np.maximum(length // self.window, 1)
        number = np.minimum(offset // self.window, windows - 1)
        start = number * self.window
        size = np.where(number == windows - 1, length - start, self.window)
        return start + permute(offset - start, size, mix(_WINDOWS, self.seed, epoch, lane, number))


@dataclass(frozen=True)
class Sequential:
    """The order of evaluation: position p is example p in every epoch, all in one lane. Same methods as `Order`."""

    examples: int

    def locate(self, epoch: int, positions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """As `Order.locate`: lane 0, and the position itself."""
        positions = _checked_positions(positions, self.examples)
        return np.zeros_like(positions), positions

    def at(self, epoch: int, positions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """As `Order.at`: the position itself, and lane 0."""
        lane, positions = self.locate(epoch, positions)
        return positions, lane


def shuffle_problem(order: Order, batch_size: int) -> str | None:
    """What is wrong with drawing batches of `batch_size` (all ranks) from this order: a sentence to warn with, or None.

    Fewer blocks in play than a batch has examples is a RecipeError: batches would be made of runs of neighbours.
    Measured with 10 classes and blocks of one class each: with 4 times as many blocks in play as examples in a batch,
    the standard deviation of a class's share of the batch is 7 to 11 % above that of an ideal shuffle; with as many, it
    is 31 to 37 % above. Nothing is wrong when all examples are in play, or when a batch takes them all.
    """
    lanes, ratio = order.lanes_used, order.blocks_in_play / batch_size
    if max(lanes * order.window, batch_size) >= order.examples or ratio >= 4:
        return None
    enough = min(-(-4 * batch_size * order.block // lanes), -(-order.examples // lanes))
    cure = f"set data.window to {enough} or more, or make data.block smaller"
    state = f"data: lanes {lanes} x window {order.window} / block {order.block} keep {order.blocks_in_play:.1f} blocks"
    if ratio < 1:
        raise RecipeError(f"{state} in play, fewer than the {batch_size} examples of a global batch; {cure}")
    return f"{state} in play, less than 4 times the {batch_size} examples of a global batch, a poor shuffle; {cure}"


@dataclass(frozen=True)
class Plan:
    """Which examples each rank takes in each micro-batch of each optimizer step.

    Step s, counted from 0 over the whole run, takes the next `batch_size` positions of epoch s // steps_per_epoch; the
    last step of an epoch takes what is left. Its examples are sorted by lane and cut into world * accumulate shares of
    equal size, give or take one: those of all ranks' first micro-batch, then those of the second. So what the ranks
    have together in a micro-batch does not depend on their number, and put end to end the shares of a step are the same
    sequence for every world and accumulate.

    With `repeats` the order of the examples is that of a round of so many epochs, which it passes once: each example
    stands in it that many times in a row, as neighbours in a batch, and an epoch is as long as ever.
    """

    order: Order | Sequential
    batch_size: int  # examples of one optimizer step, over all ranks and micro-batches
    world: int  # ranks
    accumulate: int  # micro-batches of one step on each rank
    repeats: int = 1  # of an example, side by side; 1: each epoch has all examples

    def __post_init__(self) -> None:
        for name in ("batch_size", "world", "accumulate", "repeats"):
            _check_positive(name, getattr(self, name))
        if not self.order.examples:
            raise RecipeError("plan: the split holds no examples; give it a share in data.splits, or pack more data")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank; the last may be smaller."""
        return -(-self.order.examples // self.batch_size)

    @property
    def rows(self) -> int:
        """The most examples that a micro-batch of a rank has."""
        return -(-self.batch_size // (self.world * self.accumulate))

    @property
    def examples_of_step(self) -> int:
        """How many different examples a step has at most, where none of them lies on its border."""
        return -(-self.batch_size // self.repeats)

    def total(self, step: int) -> int:
        """How many rows the step has over all ranks and micro-batches: 1 to batch_size."""
        return len(self._rows(step)[1])

    def share(self, step: int, rank: int, micro: int) -> np.ndarray:
        """The examples (K,) int64 of one rank's micro-batch, in order; K may be 0. A wrong number is an IndexError."""
        return self.uses(step, rank, micro)[0]

    def uses(self, step: int, rank: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """`share`, and how often the run has shown each of these examples before: (K,) int64 both. Where nothing is
        repeated that is the number of the epoch."""
        if not (0 <= rank < self.world and 0 <= micro < self.accumulate):
            raise IndexError(f"plan: no rank {rank} of {self.world}, micro-batch {micro} of {self.accumulate}")
        turn, run = self._rows(step)
        number, parts = micro * self.world + rank, self.world * self.accumulate
        start, stop = (len(run) * edge // parts for edge in (number, number + 1))
        if start == stop:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rows = np.arange(run.start, run.stop)
        lane, _ = self.order.locate(turn, rows // self.repeats)
        mine = rows[np.argsort(lane, kind="stable")[start:stop]]  # lanes are cheap: only our own are permuted
        positions, again = np.divmod(mine, self.repeats)
        return self.order.at(turn, positions)[0], turn * self.repeats + again

    def step_examples(self, step: int) -> np.ndarray:
        """The examples (total,) int64 of the step over all ranks and micro-batches, in the order of the epoch."""
        turn, run = self._rows(step)
        return self.order.at(turn, np.arange(run.start, run.stop) // self.repeats)[0]

    def _rows(self, step: int) -> tuple[int, range]:
        """The round of epochs that the step lies in, and the run of its rows that it takes: row r of a round is the
        example at position r // repeats."""
        if step < 0:
            raise IndexError(f"plan: steps count from 0, there is no step {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        turn, part = divmod(epoch, self.repeats)
        first, start = part * self.order.examples, place * self.batch_size
        return turn, range(first + start, first + min(start + self.batch_size, self.order.examples))


def view_number(example_ids: ArrayLike, uses: ArrayLike, views: int, seed: int) -> np.ndarray:
    """Which of its `views` stored views each example (K,) shows when it has been shown `uses` times before, a number or
    (K,): (K,) int64 in range(views).

    Uses 0 to views - 1 show every view of an example once, in an order of its own; so do the next `views` uses, in
    another order, and so on.
    """
    _check_positive("views.count", views)
    cycle, turn = np.divmod(uses, views)
    return permute(turn, views, mix(_VIEWS, seed, example_ids, cycle))


def _check_positive(name: str, value: int) -> None:
    """A RecipeError unless value >= 1."""
    if value < 1:
        raise RecipeError(f"{name} must be at least 1, not {value}; correct it in the recipe")


def _checked_positions(positions: ArrayLike, examples: int) -> np.ndarray:
    """The positions as int64; one outside range(examples) is an IndexError."""
    positions = np.asarray(positions, np.int64)
    if ((positions < 0) | (positions >= examples)).any():
        raise IndexError(f"order: a position is outside range({examples}), the examples of an epoch")
    return positions
