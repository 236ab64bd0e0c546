"""The PyTorch networks against formulas in numpy, and their distributed parts against single-process ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sparkgauge.adapters import layout  # noqa: E402
from sparkgauge.adapters.collective import Exchange, FlatGradients, Team, _buckets  # noqa: E402
from sparkgauge.adapters.torch import inputs, networks, norms, training, worker  # noqa: E402
from sparkgauge.context import Step  # noqa: E402
from sparkgauge.data.shards import Shard  # noqa: E402
from sparkgauge.errors import MachineError  # noqa: E402
from sparkgauge.models.cifar10 import RECIPES, RESNET20, SPEEDRUN, Recipe  # noqa: E402

ALONE = Exchange(Team())
ALL = pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)


@pytest.mark.parametrize(
    ("name", "count"),
    [("cifar10_quick", 145_578), ("cifar10_full", 89_578), ("cifar10_tutorial", 1_068_298), ("resnet20", 269_722)],
)
def test_parameter_count(name: str, count: int) -> None:
    network = networks.build(RECIPES[name], 1, ALONE)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@ALL
@pytest.mark.parametrize("batch", [3, 1])
def test_shapes(recipe: Recipe, batch: int) -> None:
    network = networks.build(recipe, 1, ALONE)
    assert network(_images(recipe, batch)).shape == (batch, 10)


@ALL
def test_initial_weights_depend_on_the_seed_alone(recipe: Recipe) -> None:
    first = list(networks.build(recipe, 1, ALONE).parameters())
    torch.manual_seed(99)
    again, other = (list(networks.build(recipe, seed, ALONE).parameters()) for seed in (1, 2))
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one, same)
        if one.ndim > 1 and not ((one == 0) | (one == 1)).all():  # identities are what they are
            assert not torch.equal(one, different)


@pytest.mark.parametrize("batch", [7, 0])
@pytest.mark.parametrize("name", ["cifar10_quick", "cifar10_full"])
def test_both_orders_in_memory_give_the_same_gradients(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, results = RECIPES[name], []
    images = _images(recipe, batch).contiguous(memory_format=torch.channels_last) * 100
    for blocks in (True, False):
        monkeypatch.setattr(layout, "prefers_blocks", lambda blocks=blocks: blocks)
        network = networks.build(recipe, 1, ALONE)
        logits = network(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) if batch else 0)


def test_only_float32_images_on_a_cpu_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "prefers_blocks", lambda: True)
    images = torch.zeros(2, 3, 4, 4)
    assert layout.blocked(images).layout is not torch.strided
    assert torch.equal(layout.dense(layout.blocked(images)), images)
    assert all(layout.blocked(other) is other for other in (images.double(), images[:0], images.to("meta")))


def test_norm_within_channels_is_caffes() -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype(np.float32) * 100
    framed = np.pad(x**2, ((0, 0), (0, 0), (1, 1), (1, 1)))
    squares = sum(framed[:, :, i : i + 5, j : j + 5] for i in range(3) for j in range(3)) / 9
    expected = x / (1 + 5e-5 * squares) ** 0.75
    np.testing.assert_allclose(networks.norm_within_channels(torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


def test_norm_over_channels_is_tensorflows() -> None:
    x = np.random.default_rng(1).normal(size=(2, 16, 3, 3)).astype(np.float32) * 30
    squares = np.stack([(x[:, max(0, c - 4) : c + 5] ** 2).sum(1) for c in range(16)], axis=1)
    expected = x / (1 + 0.001 / 9 * squares) ** 0.75
    np.testing.assert_allclose(networks.norm_over_channels(torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


def test_the_gradient_of_the_norm_over_channels_is_that_of_its_formula() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: networks.norm_over_channels(x, radius=2, bias=1.5, alpha=0.3), (x,))


class _TwoHalves:
    """An exchange between two halves of a batch, worked on in turn: gives the sums that were worked out before."""

    alone = False

    def __init__(self, sums: list[Any]) -> None:
        self._sums = iter(sums)

    def sum_(self, values: Any) -> Any:
        total = next(self._sums)
        assert total.shape == values.shape
        return total


def test_norm_over_executors_is_the_norm_of_the_whole_batch_in_value_and_gradient() -> None:
    torch.manual_seed(1)
    x, weight, bias, pull = torch.randn(6, 4, 5, 5) * 3 + 1, torch.rand(4), torch.rand(4), torch.randn(6, 4, 5, 5)
    leaves = [values.clone().requires_grad_() for values in (x, weight, bias)]
    y = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
    (y * pull).sum().backward()
    axes, normal = (0, 2, 3), (y.detach() - bias[None, :, None, None]) / weight[None, :, None, None]
    sums = [
        torch.cat([x.sum(axes), (x * x).sum(axes), torch.tensor([150.0])]),
        torch.cat([pull.sum(axes), (pull * normal).sum(axes)]),
    ]
    gradients = []
    for part in (slice(0, 6), slice(0, 0)):  # the second executor has no image
        own = [x[part].clone().requires_grad_(), *(v.clone().requires_grad_() for v in (weight, bias))]
        out, *_ = norms._GlobalNorm.apply(*own, _TwoHalves(sums), 1e-5)
        torch.testing.assert_close(out, y[part], rtol=1e-4, atol=1e-4)
        (out * pull[part]).sum().backward()
        gradients.append([leaf.grad for leaf in own])
    torch.testing.assert_close(gradients[0][0], leaves[0].grad, rtol=1e-3, atol=1e-4)
    for index in (1, 2):
        total = gradients[0][index] + gradients[1][index]
        torch.testing.assert_close(total, leaves[index].grad, rtol=1e-3, atol=1e-3)


class _Beside(Team):
    """Stands for two executors with the same images: their sum is twice this one's."""

    def start_sum(self, values: Any, *, beside: bool = False) -> Any:
        return lambda: values.mul_(2)


def test_gradients_of_filters_are_computed_while_sums_travel() -> None:
    exchange, alone = Exchange(_Beside("both")), Exchange(Team())
    shared, single = (networks.build(RESNET20, 1, one) for one in (exchange, alone))
    optimiser = training.Momentum(shared, RESNET20, _Beside("both"))
    told: list[Any] = []
    exchange.added = told.append
    images, labels = _images(RESNET20, 4), torch.tensor([1, 2, 3, 4])
    optimiser.gradients.clear()
    for network in (shared, single):
        torch.nn.functional.cross_entropy(network(images), labels).backward()
    filters = [one.weight for one in shared.modules() if isinstance(one, networks.Convolution)]
    assert len(filters) == 19
    assert len(told) == 18, "the first layer's is left: no sum follows it"
    exchange.work_off()
    assert {id(one) for one in told} == {id(one) for one in filters}
    for one, other in zip(shared.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_gradients_that_were_put_off_keep_no_images() -> None:
    exchange = Exchange(_Beside("both"))
    layer = networks.Convolution(exchange, 2, 2)
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer(torch.ones(1, 2, 3, 3, requires_grad=True)).sum().backward()
    exchange.work_off()
    assert layer.weight.grad.abs().sum() > 0
    assert not layer.weight.grad.requires_grad


def test_buckets_travel_when_their_last_gradient_is_there() -> None:
    started: list[int] = []

    class Watched(Team):
        def start_sum(self, values: Any, *, beside: bool = False) -> Any:
            started.append(values.numel())
            return lambda: None

    weights = [torch.nn.Parameter(torch.ones(size)) for size in (4, 3, 2)]
    gradients = FlatGradients(weights, Watched("both"), bucket_bytes=16)  # of (2 + 3), and of 4 numbers
    gradients.clear()
    (weights[2].sum() + weights[0].sum()).backward()
    assert not started
    gradients.added(weights[1])
    assert started == [5, 4]
    gradients.reduce()
    assert started == [5, 4]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs_sgd_at_a_constant_rate(nesterov: bool) -> None:
    recipe = replace(RESNET20, nesterov=nesterov, weight_decay=0.01)
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimiser = training.Momentum(ours, recipe, Team())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    for seed in range(4):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        optimiser.gradients.clear()
        reference.zero_grad()
        (ours(x) ** 2).sum().backward()
        ((theirs(x) ** 2).sum() / 8).backward()
        optimiser.step(0.1, 8)
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "buckets"), [(39, 4), (160, 3), (161, 2), (401, 1)])
def test_buckets_cover_the_buffer_once_from_its_end(limit: int, buckets: int) -> None:
    found = _buckets([10, 20, 30, 40], limit)
    assert len(found) == buckets
    assert [index for members, _ in found for index in members] == [3, 2, 1, 0]
    edges = [(part.start, part.stop) for _, part in found]
    assert edges[0][1] == 100 and edges[-1][0] == 0
    assert all(before[0] == after[1] for before, after in itertools.pairwise(edges))


def test_the_triangular_rate_rises_and_falls() -> None:
    rates = [SPEEDRUN.learning_rate(step, 100) / 1.465 for step in range(100)]
    assert max(rates) == pytest.approx(1, rel=0.03) and rates.index(max(rates)) in (22, 23)
    assert 0.2 < rates[0] < 0.22 and 0.07 < rates[-1] < 0.08
    assert SPEEDRUN.learning_rate(20, 100, 250) == SPEEDRUN.learning_rate(20, 100) / 4
    falling = replace(SPEEDRUN, start_fraction=0.0, end_fraction=0.0)
    assert 0 < falling.learning_rate(99, 100) < 0.01 * 1.465 and 0 < falling.learning_rate(0, 100) < 0.03 * 1.465


def test_slow_weights_lead_more_and_more_and_have_the_last_word() -> None:
    weights, momentum, running = torch.zeros(2), torch.ones(2), torch.zeros(1)
    lookahead = training._Lookahead([weights, momentum, running])
    for done in range(1, 12):
        weights += 1
        running += 1
        lookahead.update(done, 11)
        if done == 4:
            assert weights.tolist() == [4, 4]
    expected = 0.0  # slow weights after steps 5, 10 and 11
    for done, grown in ((5, 5), (10, 5)):
        stay = 0.95**5 * (done / 11) ** 3
        expected = stay * expected + (1 - stay) * (expected + grown)
    torch.testing.assert_close(weights, torch.full((2,), expected))
    torch.testing.assert_close(running, torch.full((1,), expected))
    assert momentum.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["cifar10_quick", "cifar10_tutorial", "resnet20", "speedrun"])
def test_batches_gathered_on_the_device_are_those_of_the_host(name: str, faint_images: Any) -> None:
    recipe, context, cpu = RECIPES[name], SimpleNamespace(seed=7), torch.device("cpu")
    shard = Shard.open(faint_images.folder, executors=2, rank=1, global_batch=100, seed=7)
    ways = [inputs.Inputs(recipe, context, shard, cpu), inputs.ResidentInputs(recipe, context, shard, cpu)]
    for index in (0, 3, 12):  # of the second epoch too, in which every other image has turned
        steps = [Step(index, *way.feed.batch(index), global_batch=100) for way in ways]
        (ours, labels), (theirs, same) = (
            way.batch(*way.arguments(step)) for way, step in zip(ways, steps, strict=True)
        )
        assert torch.equal(labels, same)
        torch.testing.assert_close(ours, theirs)


def test_an_executors_other_version_of_torch_is_refused() -> None:
    worker.check_version("2.13.0+cpu", "2.13.0+cu130")
    with pytest.raises(MachineError, match=r"expected torch 2\.13\.0, got torch 2\.11\.0"):
        worker.check_version("2.11.0", "2.13.0")


def _images(recipe: Recipe, batch: int) -> Any:
    return torch.randn(batch, recipe.input_size, recipe.input_size, 3).permute(0, 3, 1, 2)
