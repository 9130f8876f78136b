"""Representations of rotations: exact round trips, the libraries' conventions, where they jump, slopes everywhere; and the
experiments through the harness."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_research.experiment import Experiment, Method, find_experiments
from affinequant_research.rotations.charts import cut
from affinequant_research.rotations.ik import SKELETON, Body
from affinequant_research.rotations.learner import in_blocks
from affinequant_research.rotations.pointcloud import make_shapes
from affinequant_research.rotations.representations import (
    REPRESENTATIONS,
    Representation,
    all_columns,
    angle_between,
    columns,
    nearest,
    of_quaternion,
    projected,
    random_rotations,
    signed,
    similarity,
    steepest,
    turning,
)
from affinequant_research.running import run_experiment
from affinequant_research.summary import summary
from scipy.spatial.transform import Rotation
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.learning.phases import fit_durably
from affinequant.plan import plan
from affinequant.run.run import Run
from tests.tiny import tiny_llama

EXACT = 1e-13
SIZES = (2, 3, 4, 8)
OF_SO_N = {
    f"{make.__name__}-{n}": (make(n), n)
    for make in (columns, projected, nearest)
    for n in SIZES
    if n > 2 or make != projected
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(count: int, n: int, *, proper: bool) -> Tensor:
    """[count, n, n]: rotations, or every other one a reflection."""
    made = torch.linalg.qr(numbers(count, n, n)).Q
    sign = torch.linalg.det(made).sign()
    if not proper:
        sign[::2] *= -1
    return torch.cat([made[..., :-1], made[..., -1:] * sign[:, None, None]], -1)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("name", OF_SO_N)
def test_representations_of_rotations_come_back_exactly(name: str) -> None:
    one, n = OF_SO_N[name]
    rotations, wild = orthogonal(50, n, proper=True), numbers(50, one.dims, seed=1)
    assert one.g(rotations).shape == (50, one.dims)
    assert off(one.f(one.g(rotations)), rotations) <= EXACT
    for made in (one.f(wild), one.f(1000 * wild)):
        assert off(made @ made.mT, torch.eye(n).double()) <= EXACT
        assert off(torch.linalg.det(made), torch.ones(50).double()) <= EXACT


def test_dimensions_are_the_papers() -> None:
    assert [columns(n).dims for n in SIZES] == [2, 6, 12, 56]
    assert [projected(n).dims for n in (3, 4, 8)] == [5, 10, 50]
    assert [one.dims for one in REPRESENTATIONS.values()] == [3, 3, 4, 4, 5, 6, 9, 9]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("make", [all_columns, signed], ids=lambda make: make.__name__)
def test_reflections_come_back_too(make: Callable[[int], Representation], n: int) -> None:
    one, either = make(n), orthogonal(50, n, proper=False)
    assert {1.0, -1.0} == set(torch.linalg.det(either).round().tolist())
    assert off(one.f(one.g(either)), either) <= EXACT
    wild = one.f(numbers(50, one.dims, seed=1))
    assert off(wild @ wild.mT, torch.eye(n).double()) <= EXACT


@pytest.mark.parametrize("n", SIZES)
def test_similarities_come_back(n: int) -> None:
    one, scale = similarity(n), numbers(50, 1, 1, seed=2).exp()
    whole = torch.cat([scale * orthogonal(50, n, proper=True), numbers(50, n, 1, seed=3)], -1)
    assert one.g(whole).shape == (50, n * n)
    assert off(one.f(one.g(whole)), whole) <= EXACT * float(whole.abs().max())


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_each_representation_in_space_comes_back(name: str) -> None:
    one, rotations = REPRESENTATIONS[name], random_rotations(2000, torch.Generator().manual_seed(0), torch.float64)
    assert one.g(rotations).shape == (2000, one.dims)
    # pi tanh(a) loses digits near half turns: its inverse grows without bound there.
    assert off(one.f(one.g(rotations)), rotations) <= (1e-9 if name == "axis-angle" else EXACT)
    assert off(one.f(one.g(torch.eye(3).double())), torch.eye(3).double()) <= EXACT
    wild = one.f(numbers(200, one.dims, seed=1))
    assert off(wild @ wild.mT, torch.eye(3).double()) <= EXACT and bool((torch.linalg.det(wild) > 0).all())


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_half_turns_come_back(name: str) -> None:
    """Where the real part of the quaternion vanishes, and the angles of Euler are at their poles."""
    one = REPRESENTATIONS[name]
    quaternions = torch.cat(
        [torch.eye(4).double(), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0.6, 0.8, 0]]).double()]
    )
    rotations = of_quaternion(quaternions)
    assert off(one.f(one.g(rotations)), rotations) <= (1e-7 if name == "axis-angle" else EXACT)


def test_conventions_are_scipys() -> None:
    """Columns: a matrix turns column vectors, as in scipy."""
    a = numbers(20, 4)
    wxyz = Rotation.from_quat(a[:, [1, 2, 3, 0]].numpy())
    assert off(REPRESENTATIONS["quaternion"].f(a), torch.from_numpy(wxyz.as_matrix())) <= EXACT
    angles = a[:, :3]
    made = Rotation.from_euler("XZY", angles.numpy()).as_matrix()
    assert off(REPRESENTATIONS["euler"].f(angles), torch.from_numpy(made)) <= EXACT
    made = Rotation.from_rotvec(2 * angles.numpy()).as_matrix()
    assert off(REPRESENTATIONS["rodrigues"].f(angles), torch.from_numpy(made)) <= EXACT
    axis = a[:, 1:] / a[:, 1:].norm(dim=-1, keepdim=True)
    made = Rotation.from_rotvec((math.pi * a[:, :1].tanh() * axis).numpy()).as_matrix()
    assert off(REPRESENTATIONS["axis-angle"].f(a), torch.from_numpy(made)) <= EXACT
    x, y = a[:, :3], numbers(20, 3, seed=5)
    x = x / x.norm(dim=-1, keepdim=True)
    z = torch.linalg.cross(x, y)
    z = z / z.norm(dim=-1, keepdim=True)
    made = torch.stack([x, torch.linalg.cross(z, x), z], -1)  # as the paper's code does it
    assert off(REPRESENTATIONS["6d"].f(torch.cat([3 * x, y], -1)), made) <= EXACT


def test_the_lengths_of_5d_are_the_stereographic_projection() -> None:
    rotations = random_rotations(50, torch.Generator().manual_seed(0), torch.float64)
    u = torch.cat([rotations[:, 2:, 0], rotations[:, :, 1]], -1)
    u = u / u.norm(dim=-1, keepdim=True)
    assert float(u[:, 0].max()) <= 0.5**0.5 + 1e-12  # the pole is never near
    expected = torch.cat([rotations[:, :2, 0], u[:, 1:] / (1 - u[:, :1])], -1)
    assert off(projected(3).g(rotations), expected) <= EXACT


def test_the_five_numbers_are_measured_in_the_most_that_each_comes_to() -> None:
    made = REPRESENTATIONS["5d"].g(random_rotations(20000, torch.Generator().manual_seed(0), torch.float64)).abs()
    assert float(made.max()) <= 1 + 1e-12
    assert float(made.amax(0).min()) >= 0.97


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_only_the_discontinuous_jump(name: str) -> None:
    one = REPRESENTATIONS[name]
    # Through a half turn about an axis of its own, and from there through the pole of Euler's angles.
    axes = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.0, 0.8], [1.0, 2.0, -0.5]]).double()
    paths = [turning(axis, torch.eye(3).double()) for axis in axes]
    coarse, fine = (max(steepest(one.g, path, step) for path in paths) for step in (1e-2, 1e-4))
    if one.continuous:
        assert fine <= 2 * math.pi * 3 and fine <= 1.2 * coarse
    else:
        assert fine >= 50 * coarse


@pytest.mark.parametrize("n", (3, 4, 8))
def test_the_continuous_ones_are_steeper_nowhere(n: int) -> None:
    basis = torch.linalg.qr(numbers(n, n)).Q

    def path(t: Tensor) -> Tensor:
        turn = torch.eye(n).double().repeat(len(t), 1, 1)
        c, s = (2 * math.pi * t).cos(), (2 * math.pi * t).sin()
        turn[:, 0, 0], turn[:, 1, 1], turn[:, 0, 1], turn[:, 1, 0] = c, c, -s, s
        return basis @ turn @ basis.mT

    # No column moves faster than 2 pi; their lengths in the projected form are at most 1 + sqrt 2.
    assert steepest(columns(n).g, path, 1e-3) <= math.sqrt(2) * 2 * math.pi
    assert steepest(projected(n).g, path, 1e-3) <= math.sqrt(n) * (1 + math.sqrt(2)) ** 2 * 2 * math.pi


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_slopes_are_finite_where_directions_are_not_defined(name: str) -> None:
    one = REPRESENTATIONS[name]
    a = torch.zeros(3, one.dims)
    a[1, 0] = 1
    a[2] = one.g(torch.eye(3))
    if one.dims == 6:
        a[2] = torch.tensor([1.0, 2, 3, 2, 4, 6])  # one column along the other
    a.requires_grad_()
    made = one.f(a)
    (made * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert a.grad is not None and bool(a.grad.isfinite().all()) and bool(made.isfinite().all())


def test_angles_are_right_down_to_a_ten_thousandth_in_single_precision() -> None:
    angles = torch.tensor([0.0, 1e-4, 1e-3, 0.1, 2.0, math.pi])
    path = turning(torch.tensor([0.0, 0.6, 0.8]), torch.eye(3))
    turned = path(angles / (2 * math.pi))
    torch.testing.assert_close(angle_between(turned, torch.eye(3)), angles, rtol=2e-3, atol=1e-6)
    assert float(angle_between(turned, torch.eye(3)).max()) <= math.pi + 1e-6


def test_random_rotations_are_all_equally_likely() -> None:
    """Haar: angles have the density (1 - cos) / pi, hence the mean pi / 2 + 2 / pi."""
    rotations = random_rotations(20000, torch.Generator().manual_seed(0), torch.float64)
    mean = float(angle_between(rotations, torch.eye(3).double()).mean())
    assert mean == pytest.approx(math.pi / 2 + 2 / math.pi, abs=0.02)
    assert float(rotations.mean(0).abs().max()) < 0.02


TRAININGS = ("sanity", "pointcloud", "ik")


def smoke(name: str) -> tuple[Method, Experiment, Any]:
    method, (one,) = find_experiments(f"rotations.{name}")
    return method, one, one.presets["smoke"]


@pytest.mark.parametrize("name", TRAININGS)
def test_smoke_presets_measure_and_draw(name: str, tmp_path: Path) -> None:
    method, one, config = smoke(name)
    results = run_experiment(method.name, one, config, (0,), "smoke", tmp_path)
    report = summary(method, "smoke", [(one, config, results)])
    table = report["tables"][0]
    assert [row[0] for row in table["rows"]] == list(config.representations) and len(report["figures"]) >= 3
    assert all(cell for row in table["rows"] for cell in row)
    assert all(math.isfinite(entry["loss"]["last"]) for entry in results[0]["fit"])
    measured = {metric.split("/")[1] for metric in results[0]["metrics"]}
    for claim in (claim for claims in one.claims.values() for claim in claims):
        named = [claim.metric, *([claim.than] if isinstance(claim.than, str) else [])]
        assert {metric.split("/")[1] for metric in named} <= measured
        assert {metric.split("/")[0] for metric in named} <= set(one.presets["bench"].representations)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_that_was_cut_short_goes_on_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    _, one, config = smoke(name)
    config = dataclasses.replace(config, updates=200)

    def trained(folder: Path, stops_at: int | None) -> dict[str, Tensor]:
        assert one.build is not None
        torch.manual_seed(0)
        trial = one.build(config, 0, "6d")

        def batches(epoch: int) -> Iterable[Any]:
            if epoch == stops_at:
                raise KeyboardInterrupt
            return trial.phase.batches(epoch)

        often = dataclasses.replace(trial.phase.config, pause_after=1)
        fit_durably(trial.phase._replace(batches=batches, config=often), Run.open(folder, {}), "6d")
        return dict(trial.tensors())

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 1)
    again = trained(tmp_path / "cut", None)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


@pytest.mark.parametrize("updates", [0, -100, 150])
def test_updates_are_whole_blocks(updates: int) -> None:
    with pytest.raises(AffineQuantError, match="updates is"):
        in_blocks(updates)


def test_shapes_have_no_symmetry() -> None:
    """No rotation but the identity brings a shape near itself, which is what a network is asked to see."""
    shapes = make_shapes(3, 160, torch.Generator().manual_seed(0))
    assert shapes.shape == (3, 160, 3)
    torch.testing.assert_close(shapes.norm(dim=-1).amax(-1), torch.ones(3))
    turns = random_rotations(300, torch.Generator().manual_seed(1))
    far = turns[angle_between(turns, torch.eye(3)) > 0.6]
    for shape in shapes:
        nearest = torch.cdist(shape @ far.mT, shape.expand(len(far), -1, -1)).amin(-1).mean(-1)
        assert float(nearest.min()) > 0.08


def test_forward_kinematics_are_the_recursion() -> None:
    body = Body()
    turns = random_rotations(2 * len(body.names), torch.Generator().manual_seed(0)).unflatten(0, (2, -1))
    made = body.positions(turns)
    assert made.shape == (2, len(SKELETON), 3) and len(SKELETON) == 21
    place = {name: index for index, name in enumerate(body.names)}

    def recursion(name: str) -> tuple[Tensor, Tensor]:
        parent, offset, _ = SKELETON[name]
        if not parent:
            return torch.zeros(2, 3), turns[:, place[name]]
        there, frame = recursion(parent)
        return there + frame @ (torch.tensor(offset) / 100), frame @ turns[:, place[name]]

    for name in body.names:
        torch.testing.assert_close(made[:, place[name]], recursion(name)[0], rtol=0, atol=1e-5)
    lengths = (body.poses(5, torch.Generator().manual_seed(0))[:, place["left knee"]] - 0).norm(dim=-1)
    assert bool((lengths < 0.6).all())


def test_charts_learn_inside_the_quantisers_stage(tmp_path: Path) -> None:
    method, one, config = smoke("charts")
    results = run_experiment(method.name, one, config, (0,), "smoke", tmp_path)
    values = {name: entry["value"] for name, entry in results[0]["metrics"].items()}
    assert 0 < values["polar/equal updates"] < values["polar/start"] and values["polar/map@n16"] > 0
    updates, seen = results[0]["series"]["polar/held-out"]
    assert updates == [0, 1, 2] and seen[0] == values["polar/start"] and min(seen) == values["polar/equal updates"]
    report = summary(method, "smoke", [(one, config, results)])
    assert [figure["kind"] for figure in report["figures"]] == ["line", "line"]


def test_a_model_is_cut_to_its_first_layers(tmp_path: Path) -> None:
    whole, least = tiny_llama(tmp_path / "whole", layers=3), tmp_path / "least"
    cut(whole, least, 2)
    made = plan(str(least), seq_len=64)
    assert made.dims.layers == 2 and not any(".layers.2." in name for name in made.source.entries)
