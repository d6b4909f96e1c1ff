"""Rectified flow against values worked out by hand, and the solvers against what they must transport."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bitdance.models import flow


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def test_interpolate():
    x_0, x_1 = torch.tensor([2.0, -4.0]), torch.tensor([1.0, -1.0])
    close(flow.interpolate(x_0, x_1, torch.tensor(0.25)), [1.75, -3.25])
    assert torch.equal(flow.interpolate(x_0, x_1, torch.tensor(0.0)), x_0)
    assert torch.equal(flow.interpolate(x_0, x_1, torch.tensor(1.0)), x_1)


def test_velocity():
    x_pred, x_t = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
    close(flow.velocity(x_pred, x_t, torch.tensor(0.75)), [2.0, -6.0])
    close(flow.velocity(x_pred, x_t, torch.tensor(0.95)), [10.0, -30.0], atol=1e-4)
    # From t = 0.95 on the divisor stays 0.05.
    close(flow.velocity(x_pred, x_t, torch.tensor(0.99)), [10.0, -30.0], atol=1e-4)
    close(flow.velocity(x_pred, x_t, torch.tensor(1.0)), [10.0, -30.0], atol=1e-4)


def test_velocity_of_the_true_x_1_is_that_of_the_straight_path():
    x_0, x_1, t = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -1.0]), torch.tensor(0.4)
    close(flow.velocity(x_1, flow.interpolate(x_0, x_1, t), t), x_1 - x_0)


def test_time_shift():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    close(flow.time_shift(t, 3.0), [0.0, 0.1, 0.25, 1.0])
    close(flow.time_shift(t, 1.0), t)
    close(flow.time_shift(t, 0.5), [0.0, 0.4, 2 / 3, 1.0])


def test_time_grid():
    close(flow.time_grid(4), [0.0, 0.2375, 0.475, 0.7125, 0.95])
    close(flow.time_grid(2, shift=3.0), [0.0, 0.475 / (0.475 + 3 * 0.525), 0.95 / (0.95 + 3 * 0.05)])
    close(flow.time_grid(2, end=0.8), [0.0, 0.4, 0.8])
    close(flow.time_grid(4, end=0.8, power=2.0), [0.0, 0.05, 0.2, 0.45, 0.8])
    grid = flow.time_grid(100)
    assert grid.dtype == torch.float32
    assert len(grid) == 101
    assert (grid[1:] > grid[:-1]).all()


def test_training_time():
    normal = torch.tensor([0.0, 1.0, -2.0])
    close(flow.logit_normal_timesteps(normal, -0.8, 0.8), [1 / (1 + math.exp(-a)) for a in (-0.8, 0.0, -2.4)])
    shifted = flow.logit_normal_timesteps(normal, -0.8, 0.8, shift=3.0)
    close(shifted, flow.time_shift(flow.logit_normal_timesteps(normal, -0.8, 0.8), 3.0))
    draws = flow.logit_normal_timesteps(torch.randn(100_001, generator=torch.Generator().manual_seed(0)), -0.8, 0.8)
    assert draws.median().item() == pytest.approx(0.310026, abs=0.003)  # sigmoid(-0.8)
    assert draws.min() > 0 and draws.max() < 1


def test_apply_cfg():
    v_cond, v_null = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    close(flow.apply_cfg(v_cond, v_null, 3.0), [3.0, -2.0])
    assert torch.equal(flow.apply_cfg(v_cond, v_null, 1.0), v_cond)
    assert torch.equal(flow.apply_cfg(v_cond, v_null, 0.0), v_null)


def test_guidance_schedules():
    assert [flow.guidance_scale(5.0, i, 4) for i in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert [flow.guidance_scale(5.0, i, 4, "constant") for i in range(4)] == [5.0] * 4
    for scale in (1.1, 3.2, 3.9, 4.55, 6.1):
        assert flow.guidance_scale(scale, 0, 256) == 1, "exactly, so that the first step is known to be unguided"
        assert 1 < flow.guidance_scale(scale, 1, 256) < flow.guidance_scale(scale, 255, 256) < scale
    with pytest.raises(ValueError, match=r"'cosine'.*linear or constant"):
        flow.guidance_scale(2.0, 0, 4, "cosine")


def noise(num_steps, count, seed=0):
    return torch.randn(num_steps + 1, count, generator=torch.Generator().manual_seed(seed))


def solve(name, velocity_fn, noise, num_steps=None, shift=1.0):
    """Integrates a velocity field, (x, t, index of the evaluation) -> v, from which the prediction follows."""
    solver = flow.make_solver(name, len(noise) - 1 if num_steps is None else num_steps, shift)

    def predict(x, j):
        t = solver.timesteps[j]
        return x + (1 - t).clamp_min(flow.LAST_STEP) * velocity_fn(x, t, j)

    return flow.integrate(solver, predict, noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solver_carries_noise_to_a_point_mass(shift):
    x_1 = torch.tensor([1.0, -1.0]).repeat(500)
    solver = flow.make_solver("euler-maruyama", 50, shift)
    assert torch.equal(flow.integrate(solver, lambda x, j: x_1, noise(50, 1000)), x_1)


def test_one_step_by_hand():
    # S = 1: from x = 2, t = 0, dt = 0.95 with velocity 3 and noise 0.5; the score there is -2.
    x = solve("euler-maruyama", lambda x, t, number: torch.full_like(x, 3.0), torch.tensor([[2.0], [0.5]]))
    close(x, [2.0 + (3.0 - 2.0) * 0.95 + math.sqrt(2 * 0.95) * 0.5 + 3.0 * 0.05])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_table_of_euler_maruyama_is_its_formula(shift):
    """Drift v + (1 - t) score, with the score of x_t from the velocity, as in the original."""
    generator = torch.Generator().manual_seed(0)
    x, prediction, n = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    solver = flow.make_solver("euler-maruyama", 20, shift)
    grid = flow.time_grid(20, shift).double()
    for j, (t, dt) in enumerate(zip(grid[:-1], grid.diff(), strict=True)):
        v = flow.velocity(prediction, x, t)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        expected = x + (v + (1 - t) * score) * dt + (2 * (1 - t) * dt).sqrt() * n
        close(flow.solver_step(x, prediction, solver.coefficients[j], n), expected, atol=1e-5)
    close(
        flow.solver_step(x, prediction, solver.coefficients[20]),
        x + flow.velocity(prediction, x, 1 - t.new_tensor(0.05)) * 0.05,
    )


def test_velocity_is_evaluated_on_the_time_grid_and_then_at_095():
    asked = []

    def field(x, t, number):
        assert number == len(asked)
        asked.append(t)
        return torch.zeros_like(x)

    solve("euler-maruyama", field, torch.zeros(5, 2), shift=3.0)
    close(torch.stack(asked), [*flow.time_grid(4, 3.0)[:-1].tolist(), 0.95])
    assert all(t.dtype == torch.float32 and t.dim() == 0 for t in asked)


def test_solver_carries_noise_to_a_gaussian():
    """Data N(m, s^2): the marginal at t is N(t m, (1-t)^2 + t^2 s^2), and E[x_1 | x_t] is linear in x_t."""
    mean, std = 0.7, 0.5

    def field(x, t, number):
        variance = (1 - t) ** 2 + t**2 * std**2
        return flow.velocity(mean + t * std**2 / variance * (x - t * mean), x, t)

    x = solve("euler-maruyama", field, noise(200, 20_000))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, abs=0.03)


def test_solver_splits_noise_between_the_two_signs():
    """Data +1 with probability 3/4, else -1: the exact predictor, tanh of the log odds, keeps the odds."""

    def field(x, t, number):
        return flow.velocity(torch.tanh(t * x / (1 - t) ** 2 + 0.5 * math.log(3)), x, t)

    x = solve("euler-maruyama", field, noise(100, 20_000))
    assert (x > 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert (x.abs() - 1).abs().mean().item() < 0.05


MEAN, STD = 0.7, 0.5


def law_of_gaussian_data(name, num_steps, **grid):
    """Mean and standard deviation of what a solver makes of data N(m, s^2), whose best prediction is linear in x.

    Without sampling: x is kept as its coefficients of 1 and of each draw of noise.
    """
    solver = flow.make_solver(name, num_steps, **grid)

    def predict(x, j):
        t = solver.timesteps[j].double()
        gain = t * STD**2 / ((1 - t) ** 2 + t**2 * STD**2)
        return gain * x + (MEAN - gain * t * MEAN) * torch.eye(x.shape[-1], dtype=x.dtype)[0]

    draws = torch.eye(solver.num_draws + 1, dtype=torch.float64)[1:]
    x = flow.integrate(solver, predict, draws)
    return x[0].item(), x[1:].norm().item()


def exact_law(end):
    variance = (1 - end) ** 2 + end**2 * STD**2  # of x at the end; the prediction there is linear in it
    return MEAN, end * STD**2 / variance**0.5


@pytest.mark.parametrize("end", [0.95, 0.8])
@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize(("name", "order"), [("euler-maruyama", 1), ("dpmpp-2m-sde", 2), ("euler", 1), ("heun", 2)])
def test_the_order_of_the_solvers(name, order, end, power):
    """Halving the steps' length divides the error of the law by 2^order."""
    errors = []
    for num_steps in (80, 160, 320):
        mean, std = law_of_gaussian_data(name, num_steps, end=end, power=power)
        assert mean == pytest.approx(MEAN, abs=0.005)
        errors.append(abs(std - exact_law(end)[1]))
    assert errors[0] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


def test_the_exponential_solver_is_exact_for_a_constant_prediction():
    """One step to s or many steps: x_s has the mean s D and, from x_0 and the noise gathered, variance (1 - s)^2."""
    for num_steps in (1, 3, 10):
        solver = flow.make_solver("dpmpp-2m-sde", num_steps, end=0.9)
        draws = torch.eye(solver.num_draws + 1, dtype=torch.float64)[1:]
        constant = 3 * torch.eye(solver.num_draws + 1, dtype=torch.float64)[0]
        seen = []
        flow.integrate(solver, lambda x, j, seen=seen, constant=constant: seen.append(x) or constant, draws)
        close(seen[-1][0], 0.9 * 3, atol=1e-6)
        close(seen[-1][1:].norm(), 1 - 0.9, atol=1e-6)


def test_the_exponential_solver_extrapolates_predictions():
    """By hand: the second of two steps to 0.8, from t = 0.4, where r = 1/3."""
    solver = flow.make_solver("dpmpp-2m-sde", 2, end=0.8)
    weight = 0.8 - 0.4 / 9
    expected = [1 / 9, 1.5 * weight, 0.2 * math.sqrt(8 / 9), -0.5 * weight]
    close(solver.coefficients[1], expected)
    close(solver.coefficients[0], [0.36, 0.4, 0.6 * 0.8, 0.0])
    x, prediction, noise, before = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = prediction + (prediction - before) / 2
    by_hand = x / 9 + weight * middle + 0.2 * math.sqrt(8 / 9) * noise
    close(flow.solver_step(x, prediction, solver.coefficients[1], noise, before), by_hand)
    assert solver.uses_previous == (False, True, False) and solver.keeps_predictions


@pytest.mark.parametrize(
    ("name", "evaluations"), [("euler-maruyama", 5), ("dpmpp-2m-sde", 5), ("euler", 5), ("heun", 9)]
)
def test_evaluation_times(name, evaluations):
    solver = flow.make_solver(name, 4, shift=3.0)
    grid = flow.time_grid(4, 3.0).tolist()
    expected = [grid[0], *(t for t in grid[1:-1] for _ in range(2)), grid[-1]] if name == "heun" else grid[:-1]
    assert solver.timesteps.shape == (evaluations,) and solver.coefficients.shape == (evaluations, 4)
    close(solver.timesteps, [*expected, 0.95])
    assert solver.num_draws == (5 if name in ("euler-maruyama", "dpmpp-2m-sde") else 1)


def test_one_step_of_the_ode_solvers_by_hand():
    # dx/dt = x from x = 1: Euler multiplies by 1.95, then by 1.05; Heun by 1 + 0.95 + 0.95^2 / 2, then by 1.05.
    x_0 = torch.ones(1, 1)
    close(solve("euler", lambda x, t, number: x, x_0, 1), [1.95 * 1.05])
    close(solve("heun", lambda x, t, number: x, x_0, 1), [(1.95 + 0.95**2 / 2) * 1.05])


def test_heun_is_of_second_order():
    def error(name, num_steps):
        x_0 = torch.ones(1, 1, dtype=torch.float64)
        return abs(solve(name, lambda x, t, number: x * t.double().cos(), x_0, num_steps) - exact).item()

    end = math.exp(math.sin(0.95))
    exact = end + end * math.cos(0.95) * 0.05
    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=0.1)
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, rel=0.1)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match=r"solver='dopri' is unknown.*heun"):
        flow.make_solver("dopri", 4)
