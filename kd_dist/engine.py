"""How a step is taken: by one process, by DDP, or by DeepSpeed's ZeRO. The loop and the guard see the same methods.

Weights are kept in float32; lower precision is autocast around the forward pass, with a loss scale for fp16. So a
checkpoint means the same wherever it was made, and a run may go on under another engine.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    convert_to_fp32,
)
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kd_dist.batch import StudentOutput
from kd_dist.errors import TrainingError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**16  # of fp16's loss; a non-finite step halves it, as many steps without one double it as
SCALE_GROWS_AFTER = 2000
# Keys of a stage that DeepSpeed cannot have, and why.
NOT_FOR_DEEPSPEED = {
    "sam": "divides weights and gradients among the ranks and keeps float32 copies of its own, so that no weights can "
    "be moved for a second pass",
    "unfreeze": "steps and decays all weights that it was given at first, also those that are not to learn yet",
    "compile": "gathers weights in hooks that compiled code passes over",
    "channels_last": "lays the weights out flat, in an order of its own",
}


class _Plugin(DeepSpeedPlugin):
    """DeepSpeed's settings without those of transformers, which Accelerate would ask to be installed."""

    def set_deepspeed_weakref(self) -> None:
        pass


def launched_precision() -> str:
    """The precision that the launcher asks for: fp32, bf16 or fp16."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "fp32" if asked == "no" else asked


def accelerator(options: Iterable[str] = ()) -> Accelerator:
    """The processes that the launcher started, and how they work together. Raises a TrainingError for settings of
    DeepSpeed that belong to the recipe, or that this engine does not know, and for `options`, the keys that a stage
    makes use of, that are in NOT_FOR_DEEPSPEED."""
    handlers: list[Any] = [DistributedDataParallelKwargs()]
    plugin = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if importlib.util.find_spec("deepspeed") is None:
            raise TrainingError("the launcher asks for DeepSpeed, which is missing; pip install -e '.[deepspeed]'")
        if not torch.cuda.is_available():  # Accelerate would take each process for the only one
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        for key in options:
            raise TrainingError(
                f"DeepSpeed: {NOT_FOR_DEEPSPEED[key]}; take `{key}` out of the stage, or launch without DeepSpeed"
            )
        plugin = _Plugin()
        _check_deepspeed(plugin.deepspeed_config)
    return Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)


def _check_deepspeed(settings: dict[str, Any]) -> None:
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise TrainingError(
            f"DeepSpeed: zero_stage is {zero.get('stage')}; give 1, 2 or 3, or launch without DeepSpeed"
        )
    for what in ("offload_optimizer", "offload_param"):
        device = (zero.get(what) or {}).get("device")
        if device not in (None, "none"):
            raise TrainingError(f"DeepSpeed: {what} to {device!r} is not supported; remove it from the settings")
    for what in ("optimizer", "scheduler"):
        if what in settings:
            raise TrainingError(f"DeepSpeed: '{what}' is the recipe's; remove it from the settings")
    for what in ("fp16", "bf16"):
        if settings.get(what, {}).get("enabled") is True:
            raise TrainingError(f"DeepSpeed: remove '{what}' from the settings and give the stage `precision: {what}`")


def computed(model: Callable[[Tensor], StudentOutput], images: Tensor, dtype: torch.dtype | None) -> StudentOutput:
    """A student's output in float32, computed in `dtype`, or in float32 all through."""
    if dtype is None:
        return model(images)
    with torch.autocast(images.device.type, dtype):
        return convert_to_fp32(model(images))


def with_gradient(loss: Tensor) -> Tensor:
    """The loss. TrainingError: nothing that is trained takes part in it."""
    if not loss.requires_grad:
        raise TrainingError(
            "no loss of the stage depends on what it trains; raise `train_last`, or add a loss on labels or logits"
        )
    return loss


class Engine:
    """One process, or several under DDP, where each holds all weights, gradients and moments."""

    sharded = False  # whether `gradients` are a part of them, disjoint over the ranks

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None,
        compiled: bool = False,
    ) -> None:
        self.accelerator, self.module, self.dtype = accelerator, module, dtype
        self._prepare(optimizer)
        # Around DDP, whose buckets the compiler then knows. Batches of a second size are compiled for any size.
        self.call: Callable[[Tensor], StudentOutput] = torch.compile(self.model) if compiled else self.model

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.module), optimizer

    def forward(self, images: Tensor) -> StudentOutput:
        """The student's output in float32, computed in the run's precision."""
        return computed(self.call, images, self.dtype)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """For the forward and backward pass of one micro-batch, the `last` of its step or not."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add this rank's share of the step, () float32, to the gradient. Shares of ranks add up to the step's mean."""
        self._backward(with_gradient(loss) * (self.accelerator.num_processes * scale))  # ranks are averaged, not added

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self, scale: float) -> list[Tensor]:
        """The gradient of the step without its loss scale, to be changed in place; complete after the last micro-batch.
        Call it once a step."""
        found = self._gradients()
        if scale != 1 and found:
            torch._foreach_mul_(found, 1 / scale)
        return found

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self.module.parameters() if value.grad is not None]

    @contextlib.contextmanager
    def uphill(self, distance: float) -> Iterator[None]:
        """Within it the weights stand so far up the gradient of the step, over all of them together, which is
        forgotten; afterwards where they stood, to the last bit. For gradients that `gradients` has made complete."""
        moved = [value for value in self.module.parameters() if value.grad is not None]
        up, stood = [value.grad for value in moved], [value.detach().clone() for value in moved]
        with torch.no_grad():
            torch._foreach_mul_(up, distance / (get_total_norm(up) + 1e-12))  # no gradient, no way up
            torch._foreach_add_(moved, up)
        self.clear()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(moved, stood)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step; a group with an `lr_scale` takes so many times of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def step(self) -> None:
        """Move the weights and forget the gradient."""
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()

    def parts(self) -> list[Tensor]:
        """Where this rank holds its part of the weights, and the buffers, of the numbers with a fraction."""
        return [*self._weights(), *(one for one in self.module.buffers() if one.is_floating_point())]

    def _weights(self) -> list[Tensor]:
        return list(self.module.parameters())

    @torch.no_grad()
    def exchange(self, others: list[Tensor]) -> None:
        """Exchange `parts` with others of the same shapes. A collective call."""
        for mine, other in zip(self.parts(), others, strict=True):
            held = mine.clone()
            mine.copy_(other)
            other.copy_(held)

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers by name, whole on every rank. A collective call."""
        return self.module.state_dict()

    def moments(self) -> dict[str, Any]:
        """The optimiser's `state_dict()`, whole on every rank. A collective call."""
        return self.optimizer.state_dict()

    def load(self, weights: dict[str, Tensor], moments: dict[str, Any]) -> None:
        """Take over what `weights` and `moments` returned, here or under another engine.

        RuntimeError, ValueError: they are of another module.
        """
        self.load_weights(weights)
        self.optimizer.load_state_dict(moments)
        for value, state in self.optimizer.state.items():  # moments lie in memory as their weights do
            state |= {
                name: torch.empty_like(value).copy_(one) for name, one in state.items() if one.shape == value.shape
            }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` returned, beside nothing else. A collective call."""
        self.module.load_state_dict(weights)


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO 1, 2 or 3: moments, gradients and weights are divided among the ranks.

    Accelerate steps inside `backward`. Here the two are apart, so that the ranks can agree in between.
    """

    sharded = True

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.trained = [value for group in optimizer.param_groups for value in group["params"]]
        self.sizes = [len(group["params"]) for group in optimizer.param_groups]
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        # Sizes serve DeepSpeed's own statistics alone: the loop accumulates, clips and scales by itself.
        settings |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": self.accelerator.num_processes}
        settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
        self.model, _ = self.accelerator.prepare(self.module, optimizer)
        self.optimizer = self.model.optimizer  # ZeRO's
        self.stage = self.model.zero_optimization_stage()

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        return [part for group in self.optimizer.averaged_gradients.values() for part in group]

    def step(self) -> None:
        self.model.step()

    def clear(self) -> None:
        zero = self.optimizer
        zero.zero_grad()
        if self.stage == 3:
            zero.averaged_gradients = {}
        else:
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)
            zero.micro_step_id = -1

    def _whole(self, modifier: int | None = None) -> AbstractContextManager:
        """Within it every parameter is whole on every rank; changes made on rank `modifier` are kept."""
        if self.stage < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(self.module.parameters()), modifier_rank=modifier)

    def _flat(self) -> list[Tensor]:
        """This rank's part of the weights that are trained, one tensor a group, as the optimiser knows them."""
        zero = self.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Let DeepSpeed find each parameter's moments: by itself it looks after its first group alone has stepped."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, Tensor]:
        with self._whole():
            return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def moments(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self.optimizer.optimizer
        states: dict[int, dict[str, Tensor]] = {}
        if base.state:
            self._link()
            one = next(iter(base.state.values()))
            shared = {name: value for name, value in one.items() if torch.is_tensor(value) and value.ndim == 0}
            divided = sorted(
                name for name, value in one.items() if torch.is_tensor(value) and value.ndim
            )  # as on all ranks
            for number, value in enumerate(self.trained):
                full = {name: safe_get_full_optimizer_state(value, name).clone() for name in divided}
                states[number] = {**{name: one.clone() for name, one in shared.items()}, **full}
        return {"state": states, "param_groups": self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups as a `state_dict()` has them: parameters by number."""
        first, found = 0, []
        for group, size in zip(self.optimizer.optimizer.param_groups, self.sizes, strict=True):
            kept = {name: value for name, value in group.items() if name != "params"}
            found.append({**kept, "params": list(range(first, first + size))})
            first += size
        return found

    def _weights(self) -> list[Tensor]:
        own = list(self.module.parameters())
        return own if self.stage < 3 else [value.ds_tensor for value in own]

    def exchange(self, others: list[Tensor]) -> None:
        with self._whole():  # beyond it no weight is whole, and each is gathered anew
            pass
        super().exchange(others)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        with self._whole(modifier=0):
            self.module.load_state_dict(weights)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Any]) -> None:
        self.load_weights(weights)
        by_parameter = {id(value): weights[name] for name, value in self.module.named_parameters()}
        for value in self.trained:
            self._put(value, by_parameter[id(value)], None)
        base, states = self.optimizer.optimizer, moments["state"]
        base.state.clear()
        if states:
            divided = sorted({name for one in states.values() for name, value in one.items() if value.ndim})
            # A parameter that has had no gradient for a while lags behind, and ZeRO counts one step for all.
            counted = {name for one in states.values() for name in one} - set(divided)
            shared = {name: max(one[name] for one in states.values() if name in one) for name in sorted(counted)}
            for flat in self._flat():
                base.state[flat] = {name: value.clone() for name, value in shared.items()}
                base.state[flat] |= {name: torch.zeros_like(flat) for name in divided}
            self._link()
            for number, value in enumerate(self.trained):
                for name in divided:
                    whole = states.get(number, {}).get(name)
                    if whole is not None:  # a parameter that never had a gradient has none: its moments are zero
                        self._put(value, whole, name)
        for group, saved in zip(base.param_groups, moments["param_groups"], strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}

    def _put(self, parameter: nn.Parameter, whole: Tensor, name: str | None) -> None:
        """Set this rank's part of a trained weight, or of the state `name` that the optimiser has for it."""
        whole = whole.to(parameter.device)
        if self.stage < 3:
            parameter.set_full_hp_param(whole, name)
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, rank = safe_get_local_fp32_param(parameter).numel(), self.accelerator.process_index
        part = whole.flatten()[rank * size : (rank + 1) * size]
        part = nn.functional.pad(part, (0, size - len(part)))  # the last parts may reach beyond the end
        if name is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, name)


def start(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: str,
    compiled: bool = False,
) -> Engine | DeepSpeed:
    """The engine for the processes that the launcher started. `precision` is fp32, bf16 or fp16."""
    kind = DeepSpeed if accelerator.distributed_type == DistributedType.DEEPSPEED else Engine
    return kind(accelerator, module, optimizer, DTYPES[precision], compiled)
