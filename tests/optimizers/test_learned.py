"""Learned genomes: Adam finds the least loss in the box, moves what moves alone, and proposes the mean of its end."""

import numpy as np
import pytest
import torch

from evomerge.config.running import LearningConfig
from evomerge.optimizers.learned import Learner
from evomerge.spaces import Gene, canonical, categorical

STEPS = 200


def genes(count: int = 6) -> tuple[Gene, ...]:
    return tuple(Gene(f"weight:m{i % 2}:g{i}", "weight", f"g{i}", -0.5, 1.0, 0.2, 0.1) for i in range(count))


def learner(count: int = 6, moves: list[bool] | None = None, **settings: object) -> Learner:
    config = LearningConfig.model_validate({"steps": STEPS, "rate": 0.1, **settings})
    return Learner(config, genes(count), np.full(count, 0.2), np.array(moves or [True] * count))


def test_it_converges_on_a_quadratic_to_its_least_point_in_the_box() -> None:
    made, optimum = learner(), np.array([-2.0, -0.4, 0.0, 0.5, 0.9, 3.0])
    sizes = 10.0 ** np.arange(-3, 3)
    for _ in range(STEPS):
        made.follow(sizes * (made.genome - optimum))
    assert np.abs(made.averaged - np.clip(optimum, -0.5, 1.0)).max() < 0.01


def test_it_takes_the_steps_of_an_independent_adam_with_the_same_rates() -> None:
    made, random = learner(4), np.random.default_rng(3)
    leaf = torch.full((4,), 0.2, dtype=torch.float64, requires_grad=True)
    other = torch.optim.Adam([leaf], lr=0.1, betas=(0.9, 0.95), eps=1e-12)
    for step in range(30):
        gradient = random.normal(size=4)
        other.param_groups[0]["lr"] = 0.1 * (1 - 0.9 * step / STEPS)
        leaf.grad = torch.from_numpy(gradient.copy())
        other.step()
        with torch.no_grad():
            leaf.clamp_(-0.5, 1.0)
        made.follow(gradient)
        assert np.allclose(made.genome, leaf.detach().numpy(), rtol=0, atol=1e-9)


def test_it_stays_in_the_box_whatever_the_gradient() -> None:
    made, random = learner(), np.random.default_rng(0)
    for _ in range(50):
        made.follow(random.normal(size=6) * 10.0 ** random.integers(-20, 20, 6))
        for genome in (made.genome, made.averaged):
            assert np.array_equal(genome, canonical(genes(), genome))
    made.follow(np.zeros(6))
    assert np.isfinite(made.genome).all()


def test_only_what_moves_moves() -> None:
    moves = [True, False, True, False, False, True]
    made = learner(moves=moves)
    for _ in range(10):
        made.follow(np.ones(6))
    assert (made.genome != 0.2).tolist() == moves
    assert (made.averaged != 0.2).tolist() == moves


def test_genes_that_are_choices_stay_what_they_are() -> None:
    method = categorical("method", "method", "method", ("a", "b", "c"), "c")
    made = Learner(
        LearningConfig(steps=5), (method, *genes(2)), np.array([2.0, 0.2, 0.2]), np.array([False, True, True])
    )
    for _ in range(5):
        made.follow(np.ones(3))
    assert made.genome[0] == made.averaged[0] == 2.0


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (2, 1), (5, 1), (6, 2), (10, 2), (40, 10)])
def test_what_it_proposes_is_the_mean_of_the_last_quarter_of_its_steps(steps: int, last: int) -> None:
    made, random, path = learner(), np.random.default_rng(steps), []
    assert np.array_equal(made.averaged, made.genome)
    for _ in range(steps):
        made.follow(random.normal(size=6))
        path.append(made.genome)
    assert made.step == steps
    assert np.allclose(made.averaged, np.mean(path[-last:], axis=0), rtol=0, atol=1e-15)


def test_steps_shrink_to_a_tenth() -> None:
    made, sizes = learner(1, rate=0.001), []
    for _ in range(STEPS):
        before = made.genome
        made.follow(np.array([1.0]))
        sizes.append(abs(made.genome - before)[0])
    assert sizes[0] == pytest.approx(0.001)
    assert sizes[-1] == pytest.approx(0.0001, rel=0.06)
    assert sizes == sorted(sizes, reverse=True)


def test_the_more_genes_move_the_smaller_are_the_steps() -> None:
    rates = [learner(count, rate=None).rate for count in (1, 60, 120, 480, 1920)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.025])
    assert learner(480, [True] * 60 + [False] * 420, rate=None).rate == 0.1


def test_it_starts_inside_the_box_wherever_it_is_told_to_start() -> None:
    made = Learner(LearningConfig(), genes(2), np.array([5.0, -5.0]), np.array([True, True]))
    assert made.genome.tolist() == [1.0, -0.5]
