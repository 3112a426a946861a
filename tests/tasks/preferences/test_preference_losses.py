"""The losses' equations, in float64 and by hand, and where they could overflow."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.tasks.preferences.loss import Scores
from lorakit.tasks.preferences.losses import loss_names, loss_of
from lorakit.tasks.preferences.objective import Objective, objective_of
from lorakit.tasks.preferences.settings import LossSettings
from lorakit.train.config import TrainConfig


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(policy, reference=((0.0, 0.0),), tokens=((1, 1),)) -> Scores:
    return Scores(*(torch.tensor(each, dtype=torch.float64) for each in (policy, reference, tokens)))


def value(own: LossSettings, scores: Scores) -> float:
    (loss,) = Objective(own).losses(scores)
    return float(loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_by_hand(smoothing):
    own = LossSettings(loss="dpo", beta=0.5, label_smoothing=smoothing)
    margin = 0.5 * ((-7 + 8) - (-9 + 6))  # 2.0
    expected = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))
    assert value(own, pairs([[-7, -9]], [[-8, -6]])) == pytest.approx(expected, rel=1e-12)
    assert Objective(own).figures(pairs([[-7, -9]], [[-8, -6]]))["reward_margin"].tolist() == [2.0]


def test_ipo_by_hand_is_per_token():
    own = LossSettings(loss="ipo", beta=0.25)
    scores = pairs([[-7, -9]], [[-8, -6]], [[2, 3]])
    assert value(own, scores) == pytest.approx((1 / 2 - (-3 / 3) - 2) ** 2, rel=1e-12)


def test_kto_by_hand():
    own = LossSettings(loss="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    policy, reference = torch.tensor([[-7.0], [-7.0]]).double(), torch.tensor([[-8.0], [-8.0]]).double()
    scores = Scores(
        policy, reference, torch.ones(2, 1), torch.tensor([True, False]), torch.tensor(0.4, dtype=torch.float64)
    )
    expected = [2 * (1 - sigmoid(0.5 * (1 - 0.4))), 3 * (1 - sigmoid(0.5 * (0.4 - 1)))]
    assert Objective(own).losses(scores).tolist() == pytest.approx(expected, rel=1e-12)
    figures = Objective(own).figures(scores)
    assert figures["reward_chosen"][0] == figures["reward_rejected"][1] == 0.5
    assert figures["reward_chosen"][1].isnan()
    assert figures["reward_rejected"][0].isnan()
    assert figures["reward_accuracy"].tolist() == [1.0, 0.0]


def test_orpo_by_hand():
    own = LossSettings(loss="orpo", orpo_lambda=0.3)
    p, q = math.exp(-3 / 2), math.exp(-8 / 4)
    log_odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    expected = -math.log(p) - 0.3 * math.log(sigmoid(log_odds))
    assert value(own, pairs([[-3, -8]], tokens=[[2, 4]])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("means", [(0.0, -1e-9), (-1e-6, -60.0), (-math.log(2), -0.69), (-200.0, -0.1)])
def test_orpo_has_a_finite_gradient_wherever_a_probability_is_near_0_or_1(means):
    policy = torch.tensor([means], requires_grad=True)
    scores = Scores(policy, torch.zeros(1, 2), torch.ones(1, 2))
    loss = Objective(LossSettings(loss="orpo")).losses(scores).sum()
    loss.backward()
    assert loss.isfinite()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_by_hand(smoothing):
    own = LossSettings(loss="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=smoothing)
    margin = 2 * (-4 / 4 - -6 / 3) - 0.5  # 1.5
    expected = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))
    assert value(own, pairs([[-4, -6]], tokens=[[4, 3]])) == pytest.approx(expected, rel=1e-12)


def test_a_supervised_term_is_the_chosen_answers_loss_per_token():
    scores = pairs([[-7, -9]], [[-8, -6]], [[2, 3]])
    plain, with_term = LossSettings(loss="dpo", beta=0.5), LossSettings(loss="dpo", beta=0.5, sft_weight=0.8)
    assert value(with_term, scores) == pytest.approx(value(plain, scores) + 0.8 * 7 / 2, rel=1e-12)


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_falls_as_the_better_answer_becomes_likelier(name):
    loss = loss_of(name)
    own = objective_of(TrainConfig(data="-", task="preference", loss=name), loss.answers)
    single = {} if loss.answers == 2 else {"desirable": torch.tensor([True]), "kl": torch.tensor(0.0)}
    policy = torch.full((1, loss.answers), -5.0, requires_grad=True)
    scores = Scores(policy, torch.full((1, loss.answers), -5.0), torch.full((1, loss.answers), 4), **single)
    own.losses(scores).sum().backward()
    assert policy.grad[0, 0] < 0
    assert loss.answers == 1 or policy.grad[0, 1] > 0
    assert not own.loss.rewards(scores, own.own).requires_grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "dpo", "simpo_gamma": 0.5}, r"simpo_gamma: 0.5: loss: dpo does not have it\n.*simpo"),
        ({"loss": "kto", "sft_weight": 1.0}, r"sft_weight: 1.0: loss: kto does not have it\n.*dpo, ipo, simpo"),
        ({"loss": "orpo", "beta": 0.3}, r"beta: 0.3: loss: orpo does not have it"),
        ({"orpo_lambda": 0.3}, r"orpo_lambda: 0.3: loss: dpo does not have it\n.*orpo"),
        ({"loss": "ipo", "label_smoothing": 0.1}, r"label_smoothing: 0.1: loss: ipo does not have it\n.*dpo, simpo"),
        ({"beta": 0.0}, r"beta: 0.0: expected a positive number"),
    ],
)
def test_settings_that_the_loss_does_not_have_are_errors(given, message):
    with pytest.raises(ConfigError, match=message):
        objective_of(TrainConfig(data="-", task="preference", **given), 1 if given.get("loss") == "kto" else 2)


def test_the_settings_of_a_run_decide_its_objective():
    config = TrainConfig(data="-", task="preference")
    assert objective_of(config, 2).recorded() == {"loss": "dpo", "beta": 0.1}
    assert objective_of(config, 1).own.loss == "kto"
    assert objective_of(config.replace(loss="simpo"), 2).facts() == "simpo, beta 2, simpo_gamma 1"
    with pytest.raises(ConfigError, match=r"'dpp'.*did you mean 'dpo'"):
        TrainConfig(data="-", task="preference", loss="dpp")
