"""The almost-linear RNN: its map, its rollout under teacher forcing, the systems it learns, training to the same bytes."""

import dataclasses

import numpy as np
import pytest
from affinequant_research.alrnn.model import FAR, AlmostLinear, new_model, packed, unpacked

from affinequant.errors import AffineQuantError


def some_model(bent: int, size: float = 10.0, units: int = 8) -> AlmostLinear:
    random = np.random.default_rng(bent)
    model = new_model(units, bent, 3, random)
    return dataclasses.replace(model, W=size * model.W, h=random.standard_normal(units))


def step(model: AlmostLinear, z: np.ndarray) -> np.ndarray:
    """The map as it is written down."""
    bent = np.arange(model.M) >= model.M - model.P
    return model.A * z + model.W @ np.where(bent, np.maximum(z, 0), z) + model.h


@pytest.mark.parametrize("bent", [0, 1, 3, 5])
def test_a_free_run_is_the_map_again_and_again(bent: int) -> None:
    model = some_model(bent)
    made = model.free_run(model.start(np.array([1.0, -2.0, 0.5])), 260)
    assert made.shape == (260, 8) and (made[0, :3] == [1.0, -2.0, 0.5]).all()
    np.testing.assert_allclose(made[1:], [step(model, z) for z in made[:-1]], rtol=1e-10, atol=1e-10)


def test_a_run_ends_where_it_diverges() -> None:
    model = some_model(2, size=300.0)
    made = model.free_run(model.start(np.ones(3)), 1000)
    assert len(made) < 100 and np.abs(made).max() <= FAR < np.abs(step(model, made[-1])).max()
    broken = dataclasses.replace(model, h=np.full(8, np.nan))
    assert len(broken.free_run(model.start(np.ones(3)), 10)) == 1


def test_the_start_is_that_of_the_paper() -> None:
    model = new_model(50, 2, 3, np.random.default_rng(0))
    assert model.A.min() > 0 and model.A.max() < 1 and abs(model.W.std() - 0.01) < 0.001 and not model.h.any()
    assert model.L.shape == (47, 3) and abs(np.abs(model.L).max() - (6 / 50) ** 0.5) < 0.02


@pytest.mark.parametrize(("units", "bent", "observed"), [(4, 2, 3), (4, -1, 3), (4, 2, 0)])
def test_what_is_no_such_network_is_refused(units: int, bent: int, observed: int) -> None:
    with pytest.raises(AffineQuantError) as caught:
        new_model(units, bent, observed, np.random.default_rng(0))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bent", [0, 2])
def test_unpacking_is_the_adjoint_of_packing(bent: int) -> None:
    random, model = np.random.default_rng(0), some_model(bent)
    gradient = random.standard_normal((8, 8 + bent + 1))
    parts = model.A, model.W, model.h
    taken = sum((one * part).sum() for one, part in zip(unpacked(gradient, bent), parts, strict=True))
    assert (packed(*parts, bent) * gradient).sum() == pytest.approx(taken)
