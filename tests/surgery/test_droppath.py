"""A model's own drop paths and layerdrop: where they are found, and how they are restored."""

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH = 6
X = torch.randn(4, WIDTH)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training or self.drop_prob == 0, "both at once"
        return x


def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))


class Listed(nn.Module):
    """Calls the layers of its branches, and their drop paths, from lists next to each other."""

    def __init__(self, drops: list[DropPath]) -> None:
        super().__init__()
        self.first, self.second, self.drops = layers(), layers(), nn.ModuleList(drops)

    def forward(self, x: Tensor) -> Tensor:
        for first, second, drop in zip(self.first, self.second, self.drops, strict=True):
            x = x + drop(first(x).tanh())
            x = x + drop(second(x).tanh())
        return x


@pytest.mark.parametrize("shared", [False, True])
def test_drop_paths_beside_the_layers_of_a_branch_are_taken_over_until_removed(shared):
    rates = [0.2] * 3 if shared else [0.1, 0.2, 0.3]
    drops = [DropPath(0.2)] * 3 if shared else [DropPath(rate) for rate in rates]
    model = Listed(drops)
    handle = sd.apply(model, "own", example=X)
    assert handle.survival == tuple(1 - rate for rate in rates for _ in range(2))
    assert [drop.drop_prob for drop in drops] == [0.0] * 3
    model.train()(X)
    sd.remove(model)
    assert [drop.drop_prob for drop in drops] == rates


class DropsByItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.rate = nn.Linear(WIDTH, WIDTH), 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x).tanh()
        return x + (y * (torch.rand(len(x), 1) >= self.rate) if self.training else y)


class InTheHead(nn.Module):
    """Uses one drop path in all branches, and in its head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.drop, self.head = layers(), DropPath(0.2), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.drop(layer(x).tanh())
        return self.head(self.drop(x))


def test_a_drop_path_that_other_code_calls_too_cannot_be_disabled():
    model = InTheHead()
    assert "also called where nothing is skipped" in str(sd.plan(model, X))
    with pytest.raises(sd.errors.UnsupportedBlockError, match="drop path 'drop' is also called wh"):
        sd.apply(model, example=X)
    assert model.drop.drop_prob == 0.2
    listed = Listed([DropPath(0.2)] * 3)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=r"path 'drops\.0' is also called"):
        sd.apply(listed, example=X, exclude="first.0")


class Adds(nn.Module):
    def __init__(self, drop: DropPath) -> None:
        super().__init__()
        self.f, self.drop = nn.Linear(WIDTH, WIDTH), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(x).tanh())


def test_nor_can_one_that_rewritten_blocks_share_with_their_model():
    drop = DropPath(0.2)
    model = nn.Sequential(Adds(drop), Adds(drop), drop)
    with pytest.raises(sd.errors.UnsupportedBlockError, match="is also called where nothing is"):
        sd.apply(model, example=X)
    assert drop.drop_prob == 0.2
    sd.apply(model[:2], example=X)
    assert drop.drop_prob == 0.0


def test_own_says_what_to_do_about_a_drop_path_that_is_a_function():
    model = nn.Sequential(DropsByItself(), DropsByItself())
    with pytest.raises(sd.errors.SurvivalError, match=r"set its rates to 0 .*survival=\[1 - rate"):
        sd.apply(model, "own", example=X)


class Slotted:
    __slots__ = ("layerdrop",)

    def __init__(self) -> None:
        self.layerdrop = 0.5


@dataclass(frozen=True)
class Frozen:
    layerdrop: float = 0.5
    width: float = 0.1


class Configured(nn.Module):
    """Drops whole layers at the rate of a configuration."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config, self.layers = config, layers()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) >= self.config.layerdrop:
                x = x + layer(x).tanh()
        return x


class Forwards(nn.Module):
    """Has the configuration of the model inside it as an attribute that cannot be set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> object:
        return self.model.config

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class OfTheClass(Configured):
    """Has the configuration as an attribute of its class."""

    config = SimpleNamespace(layerdrop=0.5)

    def __init__(self) -> None:
        super().__init__(None)
        del self.config


class Internal(Configured):
    """Has the configuration under another name, and a property that gives it."""

    config = property(
        lambda self: self.internal, lambda self, value: setattr(self, "internal", value)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Forwards(Configured(SimpleNamespace(layerdrop=0.5))),
        OfTheClass,
        lambda: Internal(SimpleNamespace(layerdrop=0.5)),
    ],
    ids=["forwarded", "of the class", "a property"],
)
def test_a_configuration_is_changed_where_it_is_held(make):
    model = make()
    sd.apply(model, example=X)
    assert model.config.layerdrop == 0.0
    sd.remove(model)
    assert model.config.layerdrop == 0.5


@pytest.mark.parametrize("config", [SimpleNamespace(layerdrop=0.5), Slotted(), Frozen()])
def test_a_model_has_its_very_configuration_again(config):
    model = Configured(config)
    sd.plan(model, X)
    assert model.config is config
    sd.apply(model, example=X)
    assert (model.config.layerdrop, config.layerdrop) == (0.0, 0.5)
    sd.remove(model)
    assert model.config is config
    assert config.layerdrop == 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("config", [SimpleNamespace(layerdrop=0.5, width=0.1), Frozen()])
def test_a_copy_of_the_model_has_its_configuration_again(copied, config):
    model = Configured(config)
    sd.apply(model, example=X)
    if config != Frozen():
        config.width = 0.3
    again = copied(model)
    sd.remove(again)
    assert again.config == config


def test_what_was_set_in_a_configuration_meanwhile_stays_set():
    config = SimpleNamespace(layerdrop=0.5, seen=False, used=False)
    model = Configured(config)
    sd.apply(model, example=X)
    config.seen = model.config.used = True
    sd.remove(model)
    assert model.config is config
    assert config == SimpleNamespace(layerdrop=0.5, seen=True, used=True)
    sd.apply(model, example=X)
    model.config = other = SimpleNamespace(layerdrop=0.1)
    sd.remove(model)
    assert model.config is other
    assert other.layerdrop == 0.1
