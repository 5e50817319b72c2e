"""timm models: `timm/<name>`, with timm's own options, normalisation and pretrained weights."""

import statistics
from typing import Any

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models import Built


def build(name: str, classes: int, pretrained: bool, options: dict[str, Any], maps: bool, channels: int) -> Built:
    """Create a timm model with `classes` outputs; the normalisation is the one its weights were trained with.

    For another number of `channels` than 3 timm adapts its pretrained weights, and every channel has the mean over the
    three of `mean` and of `std`.
    """
    if maps:
        raise ModelError(f"timm/{name}: timm has no segmentation models; use torchvision/... or kd_dist/...")
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name.split(".")[0]):
        raise ModelError(f"timm/{name}: timm has no such model{choose.hint(name, timm.list_models())}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"timm/{name}: cannot be built with {options}: {error}") from error
    except OSError as error:  # every kind of failed download is one
        raise ModelError(
            f"timm/{name}: its pretrained weights cannot be fetched ({error}); give a file of them as "
            f"`options.pretrained_cfg_overlay.file`"
        ) from error
    config = resolve_model_data_config(backbone)
    mean, std = config["mean"], config["std"]
    if channels != len(mean):
        mean, std = ((statistics.fmean(values),) * channels for values in (mean, std))
    patches = getattr(backbone, "patch_embed", None)
    size = patches.img_size if getattr(patches, "strict_img_size", False) else None
    return Built(backbone, mean, std, size=size)
