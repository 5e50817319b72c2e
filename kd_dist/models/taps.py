"""Taps: named intermediate outputs of a network, read by forward hooks."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_dist import choose
from kd_dist.errors import ModelError
from kd_dist.models import Network
from kd_dist.models.readings import READINGS, Patches, patches, received

SYNTAX = re.compile(r"([^\s\[\]]+)(?:\[([^\s\[\]]+)\])?")
READING = re.compile(r"(grid|saliency|attention)\(([^()]+?)(?:, *([1-9][0-9]{0,3})x([1-9][0-9]{0,3}))?\)")


def reads_shares(text: str) -> bool:
    """Whether a tap reads the places' shares of a whole, as saliency() and attention() do: pooled, they would no longer
    be shares. The grid that the tap names is what makes them fewer."""
    reading = READING.fullmatch(text)
    return reading is not None and reading[1] != "grid"


class Tap(NamedTuple):
    """Where a feature comes from."""

    path: str  # of a module, as in `named_modules()` of the backbone
    selector: str | None  # the index or key of one of its outputs
    reading: str | None  # a name of READINGS; None: the output as it is
    size: tuple[int, int] | None  # the grid (h, w) that a reading brings it to; None: its own


class Taken(NamedTuple):
    """What a hook has taken since the last `collect`."""

    value: Tensor
    version: int  # how often it had been changed in place by then
    times: int  # how often the module ran


class Taps:
    """Reads named intermediate outputs of a network's backbone with forward hooks.

    `paths` maps a feature's name to its tap: a module path as in `network.backbone.named_modules()`, and in brackets
    the index or key of an output where the module has several: `layer4`, `blocks.11[0]`, `backbone[out]`.

    Features are channels first: a module's (B, C, h, w) and (B, C) stay as they are, its (B, N, C) becomes (B, C, N).
    Limit: (B, h, w, C), as Swin's stages give, looks like (B, C, h, w) and is taken for it.

    Around a tap may stand a reading: `grid(blocks.11)` makes a map (B, C, h, w) of a vision transformer's tokens;
    `saliency(blocks.11)` says where maps or tokens are strong and `attention(blocks.11.attn)` what a module of
    attention looks at, both (B, 1, h, w), on a grid of one's choice with `saliency(blocks.11, 4x8)`. See `readings`.
    For `attention` the module computes its weights where it can be seen, unfused, until the tap is removed.

    Every mistake is a ModelError that names the network and the feature: here for a path, on the first forward for
    what only that can show.
    """

    def __init__(self, network: Network, paths: Mapping[str, str]) -> None:
        self.network = network
        modules = dict(network.backbone.named_modules(remove_duplicate=False))
        self.taps = {name: self._parsed(name, text, modules) for name, text in paths.items()}
        self.overwritten: set[str] = set()  # features that the next module changes in place: these are copied
        self.taken: dict[str, Taken] = {}
        self.listening = True  # what runs meanwhile is taken
        self.patches = Patches(None, 0)  # of the last forward
        self.unfused: list[nn.Module] = []
        self.handles = [self._hooked(name, tap, modules[tap.path]) for name, tap in self.taps.items()]
        if any(tap.reading for tap in self.taps.values()):
            self.handles.append(network.backbone.register_forward_pre_hook(self._measure))

    def probe(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shape (C, *grid) of each feature for images of `size` (H, W), from two black ones in evaluation mode.

        It also finds out which features have to be copied. Parameters, buffers and modes are left as they were.
        """
        network, self.taken = self.network, {}
        modes = {module: module.training for module in network.modules()}
        images = torch.zeros(2, network.channels, *size, dtype=torch.uint8, device=network.mean.device)
        network.eval()
        try:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count changes
                network(images)
        finally:
            for module, training in modes.items():
                module.training = training
        self.overwritten |= {name for name, taken in self.taken.items() if _version(taken.value) != taken.version}
        return {name: tuple(value.shape[1:]) for name, value in self.collect(len(images)).items()}

    def collect(self, batch: int) -> dict[str, Tensor]:
        """The features of the forward of `batch` images since the last call, each (B, C, *grid); then forget them.

        They carry gradients when the forward did.
        """
        taken, self.taken = self.taken, {}
        return {name: self._feature(name, taken.get(name), batch) for name in self.taps}

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self.handles:
            handle.remove()
        for module in self.unfused:
            module.fused_attn = True
        self.taken, self.unfused = {}, []

    def _parsed(self, name: str, text: str, modules: Mapping[str, nn.Module]) -> Tap:
        reading = READING.fullmatch(text)
        kind, inner, *sides = reading.groups() if reading else (None, text, None, None)
        match = SYNTAX.fullmatch(inner)
        # Neither a grid of another size nor an output of several has a meaning there.
        odd = (kind == "grid" and sides[0]) or (kind == "attention" and match and match[2])
        if match is None or odd:
            raise self._error(
                name,
                f"'{text}' is no tap; write a module path, with [index] or [key] to pick an output, or grid(PATH), "
                f"saliency(PATH), attention(PATH), the last two also with a grid: saliency(PATH, 4x8)",
            )
        tap = Tap(*match.groups(), kind, (int(sides[0]), int(sides[1])) if sides[0] else None)
        if tap.path not in modules:
            raise self._error(name, f"there is no module '{tap.path}'{choose.hint(tap.path, filter(None, modules))}")
        return tap

    def _hooked(self, name: str, tap: Tap, module: nn.Module) -> RemovableHandle:
        if tap.reading != "attention":
            return module.register_forward_hook(functools.partial(self._take, name))
        inner = getattr(module, "attn_drop", None)
        if not isinstance(inner, nn.Module) or not hasattr(module, "fused_attn"):
            raise self._error(
                name,
                f"module '{tap.path}' is no attention that can be read (it has no attn_drop and fused_attn); give "
                f"attention() the attn of a block, or use saliency()",
            )
        if module.fused_attn:
            self.unfused.append(module)
            module.fused_attn = False
        return inner.register_forward_hook(functools.partial(self._take_attention, name))

    def _measure(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.patches = patches(module, tuple(inputs[0].shape[-2:]))

    def _take_attention(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Of the weights before dropout: as many numbers as there are tokens, instead of their square for each head."""
        try:
            value = received(inputs[0])
        except ModelError as error:
            raise self._error(name, f"module '{self.taps[name].path}' {error}") from error
        self._keep(name, value)

    def _take(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = self._selected(name, output)
        if name in self.overwritten:
            value = value.clone()
        self._keep(name, value)

    def _keep(self, name: str, value: Tensor) -> None:
        if self.listening:  # else all but this is done, so that a block that runs again does what it did
            times = self.taken[name].times if name in self.taken else 0
            self.taken[name] = Taken(value, _version(value), times + 1)

    def _selected(self, name: str, output: Any) -> Tensor:
        path, selector, *_ = self.taps[name]
        choices = None
        if isinstance(output, Mapping):
            choices = {str(key): value for key, value in output.items()}
        elif isinstance(output, Sequence):
            choices = {str(number): value for number, value in enumerate(output)}
        if choices is None and selector is not None:
            raise self._error(name, f"module '{path}' has one output, so '[{selector}]' picks none; leave it out")
        if choices is not None:
            known = ", ".join(f"'{path}[{key}]'" for key in choices)
            if selector is None:
                raise self._error(name, f"module '{path}' has several outputs; pick one of {known}")
            if selector not in choices:
                raise self._error(name, f"module '{path}' has no output '{selector}'; pick one of {known}")
            output = choices[selector]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise self._error(name, f"module '{path}' gives {kind}, not a floating-point tensor; tap another module")
        return output

    def _feature(self, name: str, taken: Taken | None, batch: int) -> Tensor:
        path, _, reading, size = self.taps[name]
        if taken is None:
            fused = (
                ", or set TIMM_FUSED_ATTN=0 before starting: timm's fused attention passes over modules inside it"
                if "attn" in path and reading != "attention"
                else ""
            )
            raise self._error(name, f"module '{path}' did not run in the forward; tap another module{fused}")
        if taken.times > 1:
            raise self._error(
                name,
                f"module '{path}' ran {taken.times} times before the feature was collected, so it is shared within the "
                f"network or the network itself ran again; tap another module",
            )
        shape = tuple(taken.value.shape)
        if reading == "attention" and shape[0] != batch:
            raise self._error(
                name,
                f"module '{path}' attends within {shape[0]} parts of {batch} images, not within each image; use "
                f"saliency() of a module around it",
            )
        if len(shape) not in (2, 3, 4) or shape[0] != batch:
            raise self._error(
                name,
                f"module '{path}' gives {shape} for {batch} images, not ({batch}, C), ({batch}, N, C) or "
                f"({batch}, C, h, w); tap a module whose first dimension is the batch",
            )
        if name not in self.overwritten and _version(taken.value) != taken.version:
            raise self._error(
                name,
                f"the output of module '{path}' is changed in place by a later one, which no probe in evaluation mode "
                f"has shown; tap that later module",
            )
        if reading is None:
            return taken.value.transpose(1, 2) if len(shape) == 3 else taken.value
        try:
            return READINGS[reading](taken.value, self.patches, size)
        except ModelError as error:
            raise self._error(name, f"module '{path}' {error}") from error

    def _error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.network.label}: feature '{name}': {problem}")


def _version(value: Tensor) -> int:
    """How often a tensor has been changed in place; inference tensors and those of compiled code do not count."""
    return 0 if torch.compiler.is_compiling() or value.is_inference() else value._version
