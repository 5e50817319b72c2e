"""probe.py: 1 where training cannot tell the difference, less the more a feature loses, and nothing global touched."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_dist.compress import FeatureCodec, pooled
from kd_dist.probe import _student, gradient_cosine


def images(count: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 7, 5), (8, 2, 2), (8, 9), (8, 40), (8,)])
def test_maps_tokens_and_vectors_agree_with_themselves_and_not_with_their_opposite(shape):
    features = gaussian(4, *shape)
    assert gradient_cosine(images(), features, features) == pytest.approx(1)
    assert gradient_cosine(images(), features, 3 * features) == pytest.approx(1)  # a cosine loss knows no size
    assert gradient_cosine(images(), features, -features) < 0
    assert gradient_cosine(images(), features, gaussian(4, *shape, seed=1)) < 0.9


def test_it_is_the_gradient_that_autograd_finds_by_hand():
    exact, decoded = gaussian(4, 6, 4, 4), gaussian(4, 6, 4, 4, seed=1)
    network, found = _student(3, 6, torch.device("cpu")), []
    for target in (exact, decoded):
        for row in range(4):
            network.zero_grad()
            image = images()[row : row + 1].float() / 255 - 0.5
            (1 - F.cosine_similarity(network(image), target[row : row + 1], dim=1)).mean().backward()
            found.append(torch.cat([one.grad.flatten() for one in network.parameters()]))
    assert len(list(network.parameters())) == 8
    by_hand = float(F.cosine_similarity(torch.stack(found[:4]), torch.stack(found[4:]), dim=1).mean())
    assert abs(by_hand) < 0.9 and gradient_cosine(images(), exact, decoded) == pytest.approx(by_hand, abs=1e-4)


def test_the_more_a_codec_loses_the_lower_it_is():
    features = F.relu(gaussian(4, 8, 16, 16))
    int8 = FeatureCodec("f", (8, 16, 16), "int8")
    fields, _, _ = int8.encode(features, np.zeros(4, np.uint32))
    stored = int8.decode({name: torch.from_numpy(values) for name, values in fields.items()})
    noisy = features + gaussian(*features.shape, seed=3)
    found = [gradient_cosine(images(), features, one) for one in (stored, pooled(features, 2), noisy)]
    assert found[0] > 0.9999 and found[0] > found[1] > found[2]


def test_a_feature_that_lost_everything_agrees_with_nothing():
    zeros, features = torch.zeros(4, 6, 4, 4), gaussian(4, 6, 4, 4)
    assert abs(gradient_cosine(images(), features, zeros)) < 0.2
    assert abs(gradient_cosine(images(), zeros, features)) < 0.2


def test_the_features_of_another_image_do_not_pass_for_the_right_ones():
    """All images have a part of every feature in common, as those of a real teacher do."""
    own = 2 * gaussian(8, 16, 1, 1, seed=1) + gaussian(8, 16, 8, 8, seed=2)
    features = F.relu(gaussian(1, 16, 1, 1) / 2 + own)
    others = gradient_cosine(images(8), features, features.roll(1, 0))
    average = gradient_cosine(images(8), features, features.mean(dim=(0, 2, 3), keepdim=True).expand_as(features))
    int8 = FeatureCodec("f", (16, 8, 8), "int8")
    fields, _, _ = int8.encode(features, np.zeros(8, np.uint32))
    stored = int8.decode({name: torch.from_numpy(values) for name, values in fields.items()})
    assert others < 0.6 and average < 0.8 and gradient_cosine(images(8), features, stored) > 0.999


def test_it_always_says_the_same_and_leaves_the_generator_and_its_inputs_alone():
    exact, decoded = gaussian(4, 6, 4, 4), gaussian(4, 6, 2, 2, seed=1)
    state, kept = torch.random.get_rng_state(), exact.clone()
    first = gradient_cosine(images(), exact, decoded)
    torch.manual_seed(5)
    assert gradient_cosine(images(), exact, decoded) == first
    torch.random.set_rng_state(state)
    gradient_cosine(images(), exact, decoded)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(exact, kept) and not exact.requires_grad and exact.grad is None


def test_it_works_where_gradients_are_off_and_in_half_precision():
    exact, decoded = gaussian(4, 6, 4, 4), gaussian(4, 6, 2, 2, seed=1)
    first = gradient_cosine(images(), exact, decoded)
    with torch.inference_mode():
        made = [one * 1 for one in (images(), exact, decoded)]
        assert made[1].is_inference() and gradient_cosine(*made) == first
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert gradient_cosine(images(), exact, decoded) == first
    assert gradient_cosine(images(), exact.half(), decoded.half()) == pytest.approx(first, abs=1e-3)


def test_the_weights_of_the_student_are_of_the_size_that_keeps_the_variance():
    layers = [layer for layer in _student(3, 50, torch.device("cpu")) if hasattr(layer, "weight")]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (16, 3, 3, 3),
        (32, 16, 3, 3),
        (64, 32, 3, 3),
        (50, 64, 1, 1),
    ]
    for layer in layers:
        weight = layer.weight.detach()
        assert float(weight.std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.1)
        assert abs(float(weight.mean())) < 0.2 * float(weight.std())
        assert not layer.bias.any()
    drawn = [layer.weight.detach().flatten()[:400] for layer in layers]
    assert torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max() < 0.25  # no layer repeats another


def test_a_feature_of_one_channel_has_a_gradient_too():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 24), np.uint8))
    exact = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    assert gradient_cosine(images, exact, exact) == pytest.approx(1.0, abs=1e-5)
    assert gradient_cosine(images, exact, exact.flip(0)) < 0.9
