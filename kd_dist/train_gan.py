"""More spectrograms than there are recordings: a generator learns from the packed ones, and what it makes is packed.

Nobody has labelled these examples: their only targets are what the teacher says, once it is cached. One process trains,
on one device; a step is a function of the seed and its number, so a run that was stopped goes on as if it had not been.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from kd_dist import assemble, checkpoint, manifest, places
from kd_dist.batch import Batch, valid_rows
from kd_dist.checkpoint import Progress
from kd_dist.data import Corridor
from kd_dist.disk import alone
from kd_dist.errors import DataError, Preempted, RecipeError, TrainingError
from kd_dist.loader import batches
from kd_dist.models.gan import Gan
from kd_dist.monitor import gan_warnings
from kd_dist.pack import Members, refuse_writing, write_folder
from kd_dist.plan import Order, Plan, mix
from kd_dist.preempt import Notice, noticed
from kd_dist.recipe import Gan as Settings
from kd_dist.recipe import Recipe
from kd_dist.tasks import records
from kd_dist.views import SpectrogramViews

# Two steps of the generator for each of the discriminator, which are half as long: else it wins.
DISCRIMINATOR_EVERY, DISCRIMINATOR_LR = 2, 0.5
BETAS = (0.5, 0.999)  # of Adam; with more momentum the two chase each other in circles (1511.06434)
CLIP = 1.0  # largest norm of either's gradient
DECAY = 0.5  # share of the training in which the instance noise falls to its floor
PARTS = 10  # of a training: after each a checkpoint and a picture
SHOWN = 16  # samples of a picture
AT_ONCE = 16  # samples of a forward pass
_SAMPLES, _STEPS = range(2)  # what a seed is for


@dataclass
class Sums:
    """Running means of an epoch, by name; tensors stay on the device until they are asked for."""

    values: dict[str, list[Tensor | float]] = field(default_factory=dict)

    def add(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.values.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, float]:
        return {name: statistics.fmean(values) for name, values in self.state().items()}

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of an epoch that is not over."""
        return {name: [float(value) for value in values] for name, values in self.values.items()}


def train_gan(recipe: Recipe) -> None:
    """Train the recipe's generator, from its last checkpoint if there is one, and pack its share of examples.

    Raises Preempted once a signal is noticed, when what was done is saved.
    """
    if recipe.gan is None:
        raise RecipeError(f"{recipe.name}: has no section `gan`; add `gan: {{}}`, and `generated: true` to a stage")
    target = places.shards_folder(recipe) / manifest.GENERATED
    if manifest.finished(target) is not None:
        made = assemble.examples(recipe, manifest.GENERATED)  # refuses another generator's
        print(f"train-gan: done before, {len(made):,} examples", file=sys.stderr)
        return
    refuse_writing(target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, content = places.generator_folder(recipe), assemble.generated_content(recipe)
    with noticed() as notice:
        with alone(folder):
            gan = train(recipe, folder, learnt_from(content), device, notice)
        with alone(places.shards_folder(recipe)):
            made = write(recipe, target, content, gan, device, notice)
    print(f"train-gan: {made['examples']:,} examples in {target}; cache the teacher's signals for them next")


def training_corridor(recipe: Recipe) -> Corridor:
    """What a generator learns from: a fresh stretch of each packed recording an epoch, as it is."""
    packed, gan, d = assemble.examples(recipe, places.TRAINING_SPLIT), recipe.gan, recipe.data
    order = Order.default(len(packed), packed.example_bytes(), gan.seed, d.block, d.lanes, d.window)
    return Corridor(
        examples=packed,
        signals=None,
        task=assemble.task(recipe),
        policy=SpectrogramViews(recipe.views.shape, seed=gan.seed),
        plan=Plan(order, gan.batch_size, 1, 1),
        rank=0,
        views=None,
        epochs=gan.epochs,
        on_error=d.on_error,
    )


def optimizer_of(gan: Gan, lr: float) -> torch.optim.Optimizer:
    """One optimizer of both; a network without gradients is left alone by its steps."""
    slower = {"params": list(gan.discriminator.parameters()), "lr": lr * DISCRIMINATOR_LR}
    return torch.optim.Adam([{"params": list(gan.generator.parameters())}, slower], lr=lr, betas=BETAS)


def train(recipe: Recipe, folder: Path, content: dict[str, Any], device: torch.device, notice: Notice) -> Gan:
    """The trained networks. Raises TrainingError when a gradient is not finite."""
    settings, corridor = recipe.gan, training_corridor(recipe)
    torch.manual_seed(settings.seed)
    gan = Gan(settings.latent, settings.width, recipe.views.shape).to(device)
    optimizer, state = optimizer_of(gan, settings.lr), Progress()
    last = checkpoint.latest(folder)
    if last is not None:
        weights, moments, state = checkpoint.load(last, content)
        gan.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        print(f"train-gan: goes on from {last}", flush=True)
    each = corridor.plan.steps_per_epoch
    part = max(1, settings.epochs // PARTS) * each
    sums, writer = Sums(state.so_far or {}), SummaryWriter(folder / "tensorboard")
    for batch in batches(corridor, state.step, len(corridor), recipe.data.workers, pin=device.type == "cuda"):
        tell_failed(state, batch, recipe.data.error_limit)
        if batch.valid.any():
            sums.add(learn(gan, optimizer, settings, batch, state.step / len(corridor), state.step))
        state.step += 1
        if state.step % each == 0:
            end_epoch(state, sums.means(), settings, writer)
            sums = Sums()
        part_over = state.step % part == 0 or state.step == len(corridor)
        if part_over:
            draw(gan, settings, device, folder / f"samples-{state.step:08d}.png", writer, state.step)
        if part_over or notice.name is not None:
            state.so_far = sums.state()
            checkpoint.save(folder, gan.state_dict(), optimizer.state_dict(), state, content)
        if notice.name is not None and state.step < len(corridor):
            raise Preempted(f"train-gan: stopped by {notice.name} after step {state.step}; the same command goes on")
    writer.close()
    return gan


def learnt_from(content: dict[str, Any]) -> dict[str, Any]:
    """What decides the trained networks, for their checkpoints: all but how many samples are packed, and how."""
    source = content["source"]
    options = {name: value for name, value in source["options"].items() if name != "share"}
    kept = {name: value for name, value in content.items() if name != "shard_size"}
    return {**kept, "source": {**source, "options": options}}


def tell_failed(state: Progress, batch: Batch, limit: int) -> None:
    """Name the recordings that could not be read. Raises DataError for more than `limit` of them in an epoch."""
    for sentence in batch.failed:
        print(f"warning: train-gan: step {state.step} goes without an example: {sentence}", file=sys.stderr, flush=True)
    state.failed += len(batch.failed)
    state.failed_now += len(batch.failed)
    if state.failed_now > limit:
        raise DataError(
            f"train-gan: {state.failed_now} recordings of an epoch could not be read, more than data.error_limit "
            f"{limit}; the last: {batch.failed[-1]}"
        )


def levels_of(batch: Batch, device: torch.device) -> Tensor:
    """The spectrograms of a batch, (B, 1, mels, frames) float32 in [-1, 1]."""
    return valid_rows(batch).images.to(device).float() / 127.5 - 1


def noise_at(share: float, noise: tuple[float, float]) -> float:
    """Standard deviation of the instance noise (1610.04490) after a share of the training: linear, then its floor."""
    first, floor = noise
    return max(first + (floor - first) * share / DECAY, floor) if share < DECAY else floor


def learn(
    gan: Gan, optimizer: torch.optim.Optimizer, settings: Settings, batch: Batch, share: float, step: int
) -> dict[str, Tensor]:
    """The steps that one batch is good for; what they were like, each a scalar: `d_real` and `d_fake`, what the
    discriminator takes for real of recordings and of samples, both losses, and `spread`, how much samples differ from
    each other in units of how much recordings do."""
    device = next(gan.parameters()).device
    torch.manual_seed(int(mix(settings.seed, _STEPS, step) >> 1))
    real, deviation = levels_of(batch, device), noise_at(share, settings.noise)
    (is_real, is_fake), found = settings.labels, {}

    def made() -> Tensor:
        return gan.generator(torch.randn(len(real), gan.latent, device=device))

    def judged(levels: Tensor) -> Tensor:
        return gan.discriminator(levels + deviation * torch.randn_like(levels))

    if step % DISCRIMINATOR_EVERY == 0:
        with torch.no_grad():
            fake = made()
        said_real, said_fake = judged(real), judged(fake)
        loss = against(said_real, is_real) + against(said_fake, is_fake)
        take(gan.discriminator, optimizer, loss, step)
        found |= {"loss_d": loss, "d_real": said_real.sigmoid().mean(), "d_fake": said_fake.sigmoid().mean()}
        if len(real) > 1:  # the last batch of an epoch may be a single one
            found["spread"] = fake.std(0).mean() / real.std(0).mean().clamp(min=1e-6)
    gan.discriminator.requires_grad_(False)
    loss = against(judged(made()), is_real)
    take(gan.generator, optimizer, loss, step)
    gan.discriminator.requires_grad_(True)
    return {**found, "loss_g": loss}


def against(said: Tensor, label: float) -> Tensor:
    """Binary cross-entropy of logits (B,) with one smoothed label (1606.03498, section 3.4)."""
    return F.binary_cross_entropy_with_logits(said, torch.full_like(said, label))


def take(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    """A step of one of the two networks down its loss."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    if not norm.isfinite():
        raise TrainingError(f"train-gan: the gradient of step {step} is not finite; lower gan.lr")
    optimizer.step()
    optimizer.zero_grad()


def end_epoch(state: Progress, means: dict[str, float], settings: Settings, writer: SummaryWriter) -> None:
    """Record and print an epoch, and warn when one of the two has given up."""
    state.failed_now = 0
    state.history.append({"epoch": len(state.history), "step": state.step, **means})
    for name, value in means.items():
        writer.add_scalar(f"gan/{name}", value, state.step)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in sorted(means.items()))
    print(f"train-gan: epoch {len(state.history)}/{settings.epochs}  {shown}", flush=True)
    for sentence in gan_warnings(state.history, settings.labels):
        print(f"warning: train-gan: {sentence}", file=sys.stderr, flush=True)


@torch.no_grad()
def samples(gan: Gan, settings: Settings, numbers: range, device: torch.device) -> Tensor:
    """Samples by number, (B, mels, frames) uint8; each is a function of the seed and its number."""
    latent = []
    for number in numbers:
        chance = torch.Generator().manual_seed(int(mix(settings.seed, _SAMPLES, number) >> 1))
        latent.append(torch.randn(gan.latent, generator=chance))
    levels = gan.generator(torch.stack(latent).to(device)).squeeze(1)
    return ((levels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def draw(gan: Gan, settings: Settings, device: torch.device, path: Path, writer: SummaryWriter, step: int) -> None:
    """A grid of samples, low bands below, as PNG and for TensorBoard."""
    from torchvision.io import write_png
    from torchvision.utils import make_grid

    made = samples(gan, settings, range(SHOWN), device).flip(1)
    grid = make_grid(made[:, None], nrow=4, pad_value=255)
    write_png(grid, str(path))
    writer.add_image("gan/samples", grid, step)


def write(
    recipe: Recipe, folder: Path, content: dict[str, Any], gan: Gan, device: torch.device, notice: Notice
) -> dict[str, Any]:
    """Pack the generator's share of examples, without labels; returns their manifest."""
    task, record = assemble.task(recipe), records.encoded({"label": None, "metadata": {}})

    def examples(numbers: range, quarantined: list[dict[str, str]]) -> Members:
        for begin in range(numbers.start, numbers.stop, AT_ONCE):
            some = range(begin, min(begin + AT_ONCE, numbers.stop))
            for number, levels in zip(some, samples(gan, recipe.gan, some, device), strict=True):
                if notice.name is not None:
                    raise Preempted(f"train-gan: stopped by {notice.name}; the same command goes on")
                yield f"generated-{number:08d}", {**task.input.members(levels.numpy()), **record}

    return write_folder(folder, assemble.generated_count(recipe), content, task, "train-gan: pack", examples)
