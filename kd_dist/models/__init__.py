"""Models by name. One file a family; every model owns its normalisation and takes uint8 or [0, 1] images."""

import hashlib
import inspect
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models.efficientnet import is_published, pads_and_normalises_alike, renamed
from kd_dist.models.heads import Head, with_head


class Built(NamedTuple):
    """What a family returns: an architecture and the normalisation that it was made for."""

    backbone: nn.Module  # (B, channels, H, W) float, normalised -> (B, classes), or (B, classes, h, w) for maps
    mean: Sequence[float]  # one a channel, of images in [0, 1]
    std: Sequence[float]
    ignored: tuple[str, ...] = ()  # what names of weights begin with that a file may hold and the backbone does not
    size: tuple[int, int] | None = None  # the only (H, W) that it takes; None: any, or what it says itself


# Where each family lives, as `build(name, classes, pretrained, options, maps, channels) -> Built`: its library loads
# only when chosen.
FAMILIES = {
    "timm": "kd_dist.models.timm:build",
    "torchvision": "kd_dist.models.torchvision:build",
    "kd_dist": "kd_dist.models.mobile:build",
}

COUNTER = ".num_batches_tracked"  # old files lack it, and nothing that we do uses it
WRAPPERS = ("net.", "model.", "module.", "backbone.")  # what all names begin with when a module around it was saved


class Network(nn.Module):
    """A backbone behind its own preprocessing: raw images in, logits out.

    Input (B, channels, H, W): uint8, or float in [0, 1]. Output (B, classes). A one-output head of a two-class task
    becomes [0, z], which has the same softmax. With `maps` the output is (B, classes, h, w), at whatever resolution the
    backbone gives. With `bounds` (low, high) the `classes` outputs are real numbers between the two, float32 in any
    precision: low + (high - low) (tanh(z) + 1) / 2. Any other shape is a ModelError on the first batch.

    `frozen` names the parameters that do not learn for now, `resting` the normalisation layers that stay in evaluation
    mode whatever `train()` says: see `kd_dist.models.blocks`. `layout` is how images lie in memory.
    """

    def __init__(
        self,
        built: Built,
        classes: int,
        image_size: int | None,
        label: str,
        maps: bool = False,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = built.backbone
        self.classes, self.image_size, self.label, self.maps = classes, image_size, label, maps
        self.channels, self.bounds, self.ignored, self.size = len(built.mean), bounds, built.ignored, built.size
        self.resting: tuple[str, ...] = ()  # names in the backbone: a module may be replaced by a synchronised one
        self.frozen: tuple[str, ...] = ()  # likewise
        self.layout = torch.preserve_format
        # Not persistent: the recipe states them, and weights stay plain weights of the architecture.
        self.register_buffer("mean", torch.tensor(built.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(built.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        size = self.image_size
        if size is not None and pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
        if self.size is not None and tuple(pixels.shape[-2:]) != self.size:
            (height, width), given = self.size, list(pixels.shape[-2:])
            raise ModelError(
                f"{self.label}: takes inputs of {height} x {width}, and views.size is {given}; give it "
                f"`options: {{img_size: {given}}}`"
            )
        logits = self.backbone(((pixels - self.mean) / self.std).to(memory_format=self.layout))
        count = images.shape[0]  # not len(), which would be a constant of an exported graph
        if not isinstance(logits, Tensor):
            raise ModelError(f"{self.label}: returns {type(logits).__name__}, not one tensor of logits")
        if self.classes == 2 and not self.maps and self.bounds is None and logits.shape == (count, 1):
            return torch.cat([torch.zeros_like(logits), logits], dim=1)
        if logits.shape[:2] != (count, self.classes) or logits.dim() != (4 if self.maps else 2):
            grid, what = ", h, w" if self.maps else "", "classes" if self.bounds is None else "outputs"
            raise ModelError(
                f"{self.label}: gives logits of shape {tuple(logits.shape)} for {count} images, but the task has "
                f"{self.classes} {what}: expected ({count}, {self.classes}{grid})"
            )
        if self.bounds is None:
            return logits
        low, high = self.bounds
        return low + (high - low) * (torch.tanh(logits.float()) + 1) / 2

    def train(self, mode: bool = True) -> "Network":
        """As of every module, but for the layers that rest."""
        super().train(mode)
        for name in self.resting:
            self.backbone.get_submodule(name).eval()
        return self


def build_network(
    model: str,
    classes: int,
    *,
    channels: int = 3,
    maps: bool = False,
    bounds: tuple[float, float] | None = None,
    head: Head | None = None,
    options: dict[str, Any],
    pretrained: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Build `family/name` or `package.module:factory`; with `maps`, one that answers at every place of an image.

    Images have so many `channels`, real outputs lie within `bounds`: see Network. A `head` replaces the last layer.

    A user's factory is called as `factory(classes=..., **options)`, with `channels=...` if it has such a parameter, and
    returns an nn.Module from normalised (B, channels, H, W) to (B, classes), with `maps` to (B, classes, h, w); without
    `mean` and `std` in the recipe it gets images in [0, 1] as they are.
    """
    if ":" in model:
        built = _own(model, classes, options, channels)
    else:
        family, _, name = model.partition("/")
        build = choose.imported(choose.entry(FAMILIES, "model family", family))
        built = build(name, classes, pretrained, options, maps, channels)
    built = built._replace(mean=mean or built.mean, std=std or built.std)
    for what, values in (("mean", built.mean), ("std", built.std)):
        if len(values) != channels:
            raise ModelError(
                f"{model}: images have {channels} channels, but {what} has {len(values)} values; give one a channel"
            )
    if head is not None:
        with_head(built.backbone, classes, head, model)
    return Network(built, classes, image_size, model, maps, bounds)


def _own(model: str, classes: int, options: dict[str, Any], channels: int) -> Built:
    """What a user's own factory makes."""
    factory = choose.imported(model)
    given = {"classes": classes}
    if "channels" in inspect.signature(factory).parameters:
        given["channels"] = channels
    choose.check_options(factory, options, given=given)
    backbone = factory(**given, **options)
    if not isinstance(backbone, nn.Module):
        raise ModelError(f"{model}: returned {type(backbone).__name__}, not a torch.nn.Module")
    return Built(backbone, (0.0,) * channels, (1.0,) * channels)


def load_weights(network: Network, path: str | Path) -> None:
    """Load a .safetensors file, or a torch file read with `weights_only=True`, strictly into the backbone.

    A torch file may hold the weights under `state_dict` or `model`. The weights may be those of a module around this
    one (`WRAPPERS`), or be named as efficientnet_pytorch does. Missing, unexpected or misshapen entries are a
    ModelError that names the first of each; what the family's `ignored` names is no part of the model and dropped.
    """
    expected = network.backbone.state_dict()
    weights = _unwrapped(read_weights(path), expected)
    if is_published(weights) and not is_published(expected):
        if not pads_and_normalises_alike(network.backbone):
            better = network.label.replace("timm/efficientnet_", "timm/tf_efficientnet_").partition(".")[0]
            better = better if better.startswith("timm/tf_") else "timm/tf_efficientnet_b4, or the size of the file"
            raise ModelError(
                f"{path}: has weights named as in efficientnet_pytorch, of a model that pads and normalises as "
                f"TensorFlow does, and {network.label} does not; write model: {better}"
            )
        found = renamed(weights, expected)
        if len(found) < len(weights):
            raise ModelError(f"{path}: has a weight under two names; give the file as it was published")
        weights = found
    weights = {name: value for name, value in weights.items() if not name.startswith(network.ignored)}
    missing = sorted(name for name in expected.keys() - weights.keys() if not name.endswith(COUNTER))
    foreign = sorted(weights.keys() - expected.keys())
    bent = sorted(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape)
    problems = [f"lacks '{missing[0]}' and {len(missing) - 1} more"] if missing else []
    problems += [f"has '{foreign[0]}' and {len(foreign) - 1} more that the model lacks"] if foreign else []
    problems += [
        f"'{name}' is {tuple(weights[name].shape)}, the model's {tuple(expected[name].shape)}" for name in bent[:1]
    ]
    if problems:
        raise ModelError(f"{path}: does not fit {network.label}: {'; '.join(problems)}; give the weights of this model")
    network.backbone.load_state_dict(weights)


def _unwrapped(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the first of `WRAPPERS` that all their names begin with and none of the expected ones."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in weights) and not any(name.startswith(prefix) for name in expected):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weights file, on the CPU. Nothing is unpickled."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file; train the stage that makes it, or correct the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # as torch writes it, nothing is deflated: what is may inflate a thousandfold
            with zipfile.ZipFile(path) as archive:
                if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                    raise ModelError("it is a compressed archive")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exception for a damaged file
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        # torch's advice is to unpickle it all the same.
        if "weights_only" in first_line or first_line.startswith("Weights only"):
            first_line = "it holds more than tensors, or pickled code, which is not loaded"
        raise ModelError(f"{path}: cannot be read as weights ({first_line}); copy or make the file again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    plain = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not plain or not all(isinstance(one, Tensor) and one.layout == torch.strided for one in loaded.values()):
        raise ModelError(f"{path}: holds no plain state dict; save model.state_dict() and give that file")
    return loaded


def weights_digest(network: Network) -> str:
    """sha256 over the backbone's state in name order: the same for the same weights, whatever file held them."""
    digest = hashlib.sha256()
    for name, value in sorted(network.backbone.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.view(-1).view(torch.uint8).numpy() if array.numel() else b"")
    return digest.hexdigest()
