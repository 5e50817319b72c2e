"""What must go together in one stage of a recipe, in how fast it learns and what its batches hold."""

from collections.abc import Iterator

from kd_dist.recipe import Stage

Keys = tuple[str, ...]  # the way from the top of a recipe to a value: ("stages", "distill", "lr")
Problems = Iterator[tuple[Keys, str]]  # where a value is, and the sentence that says what is wrong with it


def schedule_problems(stage: Stage, keys: Keys) -> Problems:
    """How fast a stage's parts learn, from when on, and by what means."""
    if stage.warmup_epochs > stage.epochs:
        yield (*keys, "warmup_epochs"), f"{stage.warmup_epochs:g} is more than the stage's {stage.epochs} epochs"
    if stage.min_lr > stage.lr:
        yield (*keys, "min_lr"), f"{stage.min_lr:g} is above lr, {stage.lr:g}"
    if stage.layer_decay != 1 and stage.backbone_lr != 1:
        yield (*keys, "layer_decay"), "gives every block a factor of its own; leave backbone_lr out, or this"
    rest = stage.epochs - stage.warmup_epochs
    if stage.cycle_epochs is None and stage.cycle_factor != 1:
        yield (*keys, "cycle_factor"), "is the growth of cycles; give cycle_epochs, the length of the first"
    if stage.cycle_epochs is not None and stage.cycle_epochs >= rest:
        yield (*keys, "cycle_epochs"), (
            f"{stage.cycle_epochs:g} leaves no restart within the {rest:g} epochs after warm-up; give less, or null"
        )
    if stage.compile and stage.gradient_checkpointing:
        yield (*keys, "compile"), "decides itself what is computed again; leave gradient_checkpointing out, or this"
    if stage.unfreeze:
        yield from _unfreeze_problems(stage, (*keys, "unfreeze"))


def _unfreeze_problems(stage: Stage, keys: Keys) -> Problems:
    """Blocks that begin to learn later."""
    if stage.train_last is None:
        yield keys, "says what learns later; give train_last, the blocks that learn from the beginning"
        return
    epoch, last = 0, stage.train_last
    for key, more in stage.unfreeze.items():
        if not key.isdecimal() or not epoch < int(key) < stage.epochs:
            yield (*keys, key), f"must be an epoch after {epoch} and before {stage.epochs}, counted from 0"
            return
        if last is None or (more is not None and more <= last):
            yield (*keys, key), f"must let more blocks learn than the {'all' if last is None else last} before it"
        epoch, last = int(key), more


def repeat_problems(stage: Stage, keys: Keys, views: int | None) -> Problems:
    """Several views of an example side by side, of so many `views` that there are; None: as many as are asked for."""
    repeats, keys = stage.views_per_decode, (*keys, "views_per_decode")
    if views is not None and repeats > views:
        yield keys, f"{repeats} views side by side, of {views} that an example has (views.count); take no more"
    elif views is not None and views % repeats:
        yield keys, (
            f"{repeats} views side by side, and an example has {views} (views.count), no multiple of it: often one "
            f"would stand beside itself; change one of the two"
        )
    if stage.epochs % repeats:
        yield keys, (
            f"the examples pass once in {repeats} epochs, which {stage.epochs} are no multiple of: some would be "
            f"shown more often than others; change one of the two"
        )
    if repeats > 1 and stage.batch_size < 2 * repeats:
        yield keys, f"{repeats} leaves fewer than two examples in a batch of {stage.batch_size}; take larger batches"
