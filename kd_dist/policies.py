"""From a recipe to its task, and to the policy that draws its views."""

from kd_dist import places
from kd_dist.inputs import Images, Input, Spectrograms
from kd_dist.inputs.spectrograms import STEPS, LogMel
from kd_dist.recipe import AUGMENTATIONS, Recipe
from kd_dist.tasks import TASKS, Regression, Task
from kd_dist.views import AugmentedViews, BlendedViews, ImageViews, MixedViews, SpectrogramViews, ViewPolicy


def task(recipe: Recipe) -> Task:
    """The recipe's task, for its kind of input."""
    t = recipe.task
    if t.name == "regression":
        return Regression(t.outputs, t.range, input_kind(recipe))
    return TASKS[t.name](t.classes, input_kind(recipe))


def input_kind(recipe: Recipe) -> Input:
    """How the recipe's examples are packed and decoded."""
    a = recipe.audio
    if a is None:
        return Images()
    front_end = LogMel(
        sample_rate=a.sample_rate, n_fft=a.n_fft, hop=a.hop, mels=a.mels, fmin=a.fmin, fmax=a.fmax, db=a.db
    )
    return Spectrograms(front_end, a.shortest)


def view_policy(recipe: Recipe) -> ViewPolicy:
    """The policy by which the recipe draws its views."""
    v = recipe.views
    if recipe.audio is not None:
        low, high = recipe.audio.db
        gain = round(v.gain * STEPS / (high - low))
        return SpectrogramViews(v.shape, gain=gain, time_mask=v.time_mask, band_mask=v.band_mask, seed=v.seed)
    plain = ImageViews(
        size=v.shape,
        crop_scale=v.crop_scale,
        crop_ratio=v.crop_ratio,
        flip=v.flip,
        brightness=v.brightness,
        contrast=v.contrast,
        saturation=v.saturation,
        seed=v.seed,
        whole=TASKS[recipe.task.name].canonical_whole,
    )
    if v.self_blend:
        return BlendedViews(**vars(plain), self_blend=v.self_blend)
    if v.is_augmented:
        plain = AugmentedViews(**vars(plain), **{name: getattr(v, name) for name in AUGMENTATIONS})
    return MixedViews(plain, v.mixup, v.cutmix, v.mixed) if v.is_mixed else plain


def canonical_policy(recipe: Recipe) -> ViewPolicy:
    """The policy of a split that nothing is drawn for. However much is done to an image in training, the record of a
    canonical view is that of a plain one, and a cache of it stays valid."""
    policy = view_policy(recipe)
    if isinstance(policy, (AugmentedViews, MixedViews)):
        return ImageViews(policy.size, seed=policy.seed, whole=TASKS[recipe.task.name].canonical_whole)
    return policy


def split_policy(recipe: Recipe, split: str) -> ViewPolicy:
    """The policy of a split's views."""
    return view_policy(recipe) if places.stored_views(recipe, split) else canonical_policy(recipe)
