"""timm models: `timm/<name>`, with timm's own options, normalisation and pretrained weights."""

from typing import Any

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models import Built


def build(name: str, classes: int, pretrained: bool, options: dict[str, Any], maps: bool) -> Built:
    """Create a timm model with `classes` outputs; the normalisation is the one its weights were trained with."""
    if maps:
        raise ModelError(f"timm/{name}: timm has no segmentation models; use torchvision/... or kd_dist/...")
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name.split(".")[0]):
        raise ModelError(f"timm/{name}: timm has no such model{choose.hint(name, timm.list_models())}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"timm/{name}: cannot be built with {options}: {error}") from error
    except OSError as error:  # every kind of failed download is one
        raise ModelError(
            f"timm/{name}: its pretrained weights cannot be fetched ({error}); give a local file"
        ) from error
    config = resolve_model_data_config(backbone)
    return Built(backbone, config["mean"], config["std"])
