import itertools
from dataclasses import replace

import pytest

from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.sweep.folder import Sweep
from stochastic_depth.lab.sweep.grid import Grid
from stochastic_depth.train.runtime import resolve_runtime
from support.small_sweep import GRID, SMALL


def test_every_rule_meets_every_p_and_constant_depth_has_none():
    grid = Grid(("linear", "uniform", "constant"), (0.2, 1.0), (8, 14), (3, 4))
    found = [(p.rule, p.survival, p.depth, p.seed) for p in grid.points()]
    stochastic = set(itertools.product(("linear", "uniform"), (0.2, 1.0), (8, 14), (3, 4)))
    constant = set(itertools.product(("constant",), (None,), (8, 14), (3, 4)))
    assert len(found) == len(set(found))
    assert set(found) == stochastic | constant
    assert [seed for *_, seed in found] == sorted(seed for *_, seed in found)


def test_a_point_changes_its_four_values_and_nothing_else():
    grid = Grid(("uniform",), (0.2,), (14,), (7,))
    config = grid.points()[0].of(SMALL)
    assert (config.survival.rule, config.survival.final) == ("uniform", 0.2)
    assert (config.model.depth, config.seed) == (14, 7)
    survival, model = SMALL.survival, SMALL.model
    assert replace(config, survival=survival, model=model, seed=SMALL.seed) == SMALL


@pytest.mark.parametrize(
    ("gate", "asked", "engines"),
    [
        ("batch", "auto", {"auto"}),
        ("subset", "auto", {"eager"}),
        ("subset", "compiled", {"compiled"}),
    ],
)
def test_all_points_of_a_sweep_have_one_engine(gate, asked, engines, tmp_path):
    config = replace(SMALL, survival=replace(SMALL.survival, gate=gate), engine=asked)
    sweep = Sweep(tmp_path, "survival", GRID, config)
    assert {sweep.configs[point].engine for point in GRID.points()} == engines
    runtimes = {resolve_runtime(one) for one in sweep.configs.values()}
    assert len({(found.engine, found.kernels) for found in runtimes}) == 1


def test_names_are_readable_and_different():
    names = [point.name for point in GRID.points()]
    assert names[:3] == [
        "linear-0.3-depth8-seed0",
        "linear-0.6-depth8-seed0",
        "constant-depth8-seed0",
    ]
    assert len(set(names)) == 6


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"survival": (0.5, 0.2, 0.5)}, r"survival are \[0.5, 0.2, 0.5\]: give each value once"),
        ({"seeds": ()}, "no seeds"),
    ],
)
def test_a_grid_without_points_or_with_one_twice_is_refused(change, shown):
    with pytest.raises(ConfigError, match=shown):
        replace(GRID, **change)
