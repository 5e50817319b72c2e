"""torchvision models: `torchvision/<name>`, for images and, with `maps`, for segmentation; its official weights."""

import contextlib
import enum
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, hub, nn

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models import Built

# Heads that only help training: official files hold them, our models do not.
AUXILIARY = ("aux_classifier.", "aux1.", "aux2.", "AuxLogits.")
# Builders whose defaults add such heads, and which turn our normalisation into their own only when told to.
PLAIN = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


class BeforeUpsampling(nn.Module):
    """A torchvision segmentation model without its last step: (B, 3, H, W) -> logits (B, classes, h, w).

    h and w are H/8 and W/8, rounded up; H/16 for the *_mobilenet_v3_large of DeepLabV3. State names are torchvision's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = model.backbone, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.classifier(features.get("out", features))  # LR-ASPP's classifier takes the whole mapping


def build(name: str, classes: int, pretrained: bool, options: dict[str, Any], maps: bool, channels: int) -> Built:
    """Create a torchvision model with `classes` outputs; the normalisation is that of its official weights.

    `pretrained` means these weights as they are, so only for their own number of classes.
    """
    from torchvision import models

    label = f"torchvision/{name}"
    if channels != 3:
        raise ModelError(
            f"{label}: torchvision's models take images of 3 channels, and these have {channels}; use timm/... or "
            f"kd_dist/mobile_vit"
        )
    known = models.list_models(module=models.segmentation if maps else models)
    if name not in known:
        kind = "segmentation" if maps else "classification"
        raise ModelError(f"{label}: torchvision has no such {kind} model{choose.hint(name, known)}")
    backbone = _segmentation(name, classes, options) if maps else _classification(name, classes, options)
    weights = models.get_model_weights(name).DEFAULT
    if pretrained:
        own = len(weights.meta["categories"])
        if own != classes:
            raise ModelError(
                f"{label}: its official weights {_file_name(weights)} are for {own} classes, not {classes}; give a "
                f"local file instead (`weights: <file>`)"
            )
        load_official(backbone, weights, label)
    preset = weights.transforms()
    return Built(backbone, tuple(preset.mean), tuple(preset.std), AUXILIARY)


def load_official(module: nn.Module, weights: Any, label: str, part: str = "") -> None:
    """Load torchvision's own `weights` (a WeightsEnum), or what is under `part` in them; `label` begins the errors."""
    state = _official_state(weights, label)
    names = [name for name in state if name.startswith(part) and not name.startswith(AUXILIARY)]
    try:
        module.load_state_dict({name.removeprefix(part): state[name] for name in names})
    except RuntimeError as error:
        raise ModelError(
            f"{label}: its official weights {_file_name(weights)} do not fit it with these options; leave the options "
            f"out, or give a local file (`weights: <file>`)"
        ) from error


def _official_state(weights: Any, label: str) -> dict[str, Tensor]:
    """The state dict from torch hub's folder, downloaded to it when it is not there.

    The hash in a file's name is checked on a download only: a file that a user puts there is taken as it is.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says there what it downloads: stdout is for results
            return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # a download fails in many ways, and every reader has its own exception
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{label}: its official weights {_file_name(weights)} can be neither read nor downloaded ({first_line}); "
            f"put the file into {hub.get_dir()}/checkpoints, or give a local file (`weights: <file>`)"
        ) from error


def _file_name(weights: Any) -> str:
    return weights.url.rpartition("/")[2]


def _segmentation(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model

    if options:  # torchvision passes over whatever it is given here
        raise ModelError(f"torchvision/{name}: takes no options, not '{next(iter(options))}'")
    return BeforeUpsampling(get_model(name, weights=None, weights_backbone=None, num_classes=classes))


def _classification(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model, get_model_builder

    known = _option_names(get_model_builder(name))
    for option in options:  # some builders would pass over an option that they do not know
        if option not in known:
            raise ModelError(f"torchvision/{name}: unknown option '{option}'{choose.hint(option, known)}")
    try:
        return get_model(name, weights=None, num_classes=classes, **PLAIN.get(name, {}) | options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"torchvision/{name}: cannot be built with {options}: {error}") from error


def _option_names(builder: Callable[..., Any]) -> set[str]:
    """Every parameter of the functions and classes in a builder's file: builders pass options on as `**kwargs`."""
    own = [one for one in vars(sys.modules[builder.__module__]).values() if callable(one)]
    own = [one for one in own if one.__module__ == builder.__module__ and not isinstance(one, enum.EnumMeta)]
    parameters = {name for one in own for name in inspect.signature(one).parameters}
    return parameters - {"weights", "num_classes", "kwargs", "args", "self"}
