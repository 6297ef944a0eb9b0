"""Laws of the noise that belongs to samples: its distribution, and what it does not depend on."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from heliostat.models.dropout import Dropout, find_dropouts, key_samples, mix
from heliostat.models.tasks import choose_task
from heliostat.signature import Classes, Signature, Vector
from heliostat.train import loop

ROWS, WIDTH = 200, 300
KEYS = mix(torch.arange(ROWS))
over_shares = pytest.mark.parametrize("share", [0.1, 0.5, 0.9])


def drop(model: nn.Module, keys: Tensor, width: int = WIDTH) -> Tensor:
    with key_samples(find_dropouts(model), keys):
        dropped: Tensor = model(torch.ones(len(keys), width))
    return dropped


def is_near(measured: float, chance: float, draws: int) -> bool:
    """Within five standard deviations of a share of `draws` independent draws."""
    return abs(measured - chance) < 5 * math.sqrt(chance * (1 - chance) / draws)


@over_shares
def test_the_share_that_is_kept_is_scaled_to_the_same_mean(share: float) -> None:
    dropped = drop(Dropout(share), KEYS)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], torch.full((int(kept.sum()),), 1 / (1 - share)))
    assert is_near(kept.float().mean().item(), 1 - share, ROWS * WIDTH)
    assert all(is_near(row, 1 - share, WIDTH) for row in kept.float().mean(dim=1).tolist())
    assert all(is_near(place, 1 - share, ROWS) for place in kept.float().mean(dim=0).tolist())


@over_shares
def test_any_two_draws_are_independent(share: float) -> None:
    """Of another sample, a neighbouring place, a key that is one further, and another layer."""
    first, second = Dropout(share), Dropout(share)
    with key_samples([first, second], KEYS):
        kept, other_layer = (layer(torch.ones(ROWS, WIDTH)) > 0 for layer in (first, second))
    pairs = {
        "samples": (kept[1:], kept[:-1]),
        "places": (kept[:, 1:], kept[:, :-1]),
        "keys": (kept, drop(Dropout(share), KEYS + 1) > 0),
        "layers": (kept, other_layer),
    }
    chance = share**2 + (1 - share) ** 2
    for what, (one, other) in pairs.items():
        assert is_near((one == other).float().mean().item(), chance, one.numel()), what


@pytest.mark.parametrize("sizes", [[ROWS], [1, ROWS - 1], [50] * 4, [0, ROWS]])
def test_a_samples_noise_is_the_same_however_the_batch_is_cut(sizes: list[int]) -> None:
    layer = Dropout(0.5)
    whole = drop(layer, KEYS)
    parts = [drop(layer, keys) for keys in torch.split(KEYS, sizes)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drop(layer, KEYS.flip(0)).flip(0), whole)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_every_place_of_a_sample_is_drawn_for(shape: tuple[int, ...]) -> None:
    layer, x = Dropout(0.5), torch.randn(ROWS, *shape)
    with key_samples([layer], KEYS):
        dropped = layer(x)
        flat = layer(x.flatten(1))
    assert torch.equal(dropped.flatten(1), flat)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    layer = Dropout(0.3)
    with key_samples([layer], KEYS):
        dropped = layer(x)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped)


def test_every_seed_step_and_place_in_the_global_batch_draws_anew() -> None:
    model = nn.Sequential(Dropout(0.5), nn.Linear(WIDTH, 2))
    task = choose_task(Signature(Vector(WIDTH), Classes(("no", "yes"))))
    still = torch.optim.SGD(model.parameters(), lr=1.0)
    x, labels = torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.long)

    def losses(seed: int, first_step: int, first_row: int) -> list[float]:
        batch = loop.Batch((x,), labels, first_row, 1, 1)
        recipe = loop.Recipe(rate=lambda step: 0.0, seed=seed)
        reports = loop.fit(model, task, still, [batch] * 3, recipe, first_step=first_step)
        return [report.metrics["loss"] for report in reports]

    cases = itertools.product((0, 1), (0, 3), (0, 1))
    drawn = [loss for case in cases for loss in losses(*case)]
    assert len(set(drawn)) == len(drawn) == 24
    assert losses(1, 3, 1) == drawn[-3:]


def test_nothing_is_dropped_but_in_training() -> None:
    layer, x = Dropout(0.5), torch.randn(ROWS, WIDTH)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_without_keys_it_is_pytorchs() -> None:
    layer, x = Dropout(0.5), torch.randn(ROWS, WIDTH)
    drop(layer, KEYS)
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    assert torch.equal(ours, nn.functional.dropout(x, 0.5))


def test_numbers_are_mixed_as_published() -> None:
    """The first numbers of SplitMix64 from the seed 1234567, as unsigned ones."""
    seeds = torch.tensor([1234567]) + torch.arange(1, 6) * -0x61C8864680B583EB
    assert [number % 2**64 for number in mix(seeds).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
