"""What a model takes: numbers that can be worked out by hand."""

import time

import pytest
import torch
from torch import nn

from kd_dist import cost
from kd_dist.cost import LATENCY_RUNS, measure, peak_bytes
from kd_dist.models import Built, Network, build_network


class Calls(nn.Module):
    """A known convolution and a known linear layer; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 6, 5)
        self.seen = []

    def forward(self, images):
        self.seen.append((images.shape, self.training, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return self.head(self.conv(images).flatten(1))


def test_parameters_and_macs_of_known_layers():
    backbone = Calls()
    network = Network(Built(backbone, (0.5,) * 3, (0.5,) * 3), 5, None, "calls")
    found = measure(network, (8, 6))
    assert found["parameters"] == (3 * 4 * 9 + 4) + (192 * 5 + 5)
    assert found["macs"] == 8 * 6 * 4 * 27 + 192 * 5
    assert 0 < found["latency_ms"] < 1000
    assert len(backbone.seen) == 1 + LATENCY_RUNS + 1
    assert set(backbone.seen[:-1]) == {(torch.Size((1, 3, 8, 6)), False, 1, True)}
    assert backbone.seen[-1] == (torch.Size((1, 3, 8, 6)), False, 1, False)  # for the memory


def test_a_slow_model_is_timed_three_times(monkeypatch):
    monkeypatch.setattr(cost, "LATENCY_SECONDS", 0.1)

    class Slow(Calls):
        def forward(self, images):
            time.sleep(cost.LATENCY_SECONDS / 2)
            return super().forward(images)

    backbone = Slow()
    measure(Network(Built(backbone, (0.5,) * 3, (0.5,) * 3), 5, None, "slow"), (8, 6))
    assert len(backbone.seen) == 1 + 3 + 1


def test_measuring_gives_the_threads_back():
    class Broken(nn.Module):
        def forward(self, images):
            raise KeyError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure(Network(Built(Calls(), (0.0,) * 3, (1.0,) * 3), 5, None, "calls"), (8, 6))
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError):
            measure(Network(Built(Broken(), (0.0,) * 3, (1.0,) * 3), 5, None, "broken"), (8, 6))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ memory

FLOAT, PIXELS = 4, 8 * 8  # bytes; places of an image


class Chain(nn.Module):
    """Layers of which each forgets what it was given, as far as its caller lets it: the input stays."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values):
        for layer in self.layers:
            values = layer(values)
        return values


class Keeping(Chain):
    """The same, but it keeps what each layer made until the end."""

    def forward(self, values):
        kept = [values]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        return kept[-1]


def convolution(given: int, made: int) -> nn.Conv2d:
    return nn.Conv2d(given, made, 1, bias=False)


def widths(kind: type[nn.Module]) -> tuple[nn.Module, int]:
    """Three convolutions, 2 -> 5 -> 7 -> 3 channels, and the bytes of their weights."""
    return kind(convolution(2, 5), convolution(5, 7), convolution(7, 3)), FLOAT * (10 + 35 + 21)


def test_the_peak_is_the_most_that_is_alive_at_once():
    image = torch.zeros(1, 2, 8, 8)
    chain, weights = widths(Chain)
    assert peak_bytes(chain, image) == weights + FLOAT * PIXELS * (2 + 5 + 7)  # the input, and the widest neighbours
    keeping, _ = widths(Keeping)
    assert peak_bytes(keeping, image) == weights + FLOAT * PIXELS * (2 + 5 + 7 + 3)


def test_what_is_done_in_place_or_is_a_view_takes_nothing():
    image = torch.zeros(1, 2, 8, 8)
    plain, more = Chain(convolution(2, 5)), Chain(convolution(2, 5), nn.ReLU(inplace=True), nn.Flatten())
    assert peak_bytes(plain, image) == peak_bytes(more, image) == FLOAT * (10 + PIXELS * (2 + 5))
    copied = Chain(convolution(2, 5), nn.ReLU())
    assert peak_bytes(copied, image) == FLOAT * (10 + PIXELS * (2 + 5 + 5))


def test_buffers_and_shared_weights_count_once():
    image = torch.zeros(1, 2, 8, 8)
    layer = convolution(2, 2)
    shared = Chain(layer, layer)
    assert peak_bytes(shared, image) == FLOAT * (4 + PIXELS * 3 * 2)
    shared.register_buffer("table", torch.zeros(1000, dtype=torch.uint8))
    assert peak_bytes(shared, image) == FLOAT * (4 + PIXELS * 3 * 2) + 1000


class Product(nn.Module):
    """An operation made of two, as which inference mode would hide what the first of them made."""

    def forward(self, values):
        return torch.linalg.multi_dot([values, values, values])


def test_what_a_composite_operation_makes_inside_counts():
    assert peak_bytes(Product(), torch.zeros(8, 8)) == FLOAT * PIXELS * 3


def test_memory_is_the_same_every_time_and_in_millions_of_bytes():
    network = build_network("kd_dist/mobile_vit", 2, options={}).eval()
    first, second = (measure(network, (64, 64))["memory_mb"] for _ in range(2))
    assert first == second == peak_bytes(network, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)) / 1e6
    assert first > 4 * sum(value.numel() for value in network.parameters()) / 1e6
