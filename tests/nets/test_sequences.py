"""Networks for sequences: what each score may depend on."""

from __future__ import annotations

import pytest
import torch

from trimtab.nets import MADE, MaskedMLP, SequenceScore

LENGTH, VALUES = 5, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("hidden", [4, 7, 32])
def test_made_sees_what_stands_before_and_all_of_it(hidden: int) -> None:
    net = MADE(LENGTH, VALUES, hidden=hidden, blocks=2).double()
    tokens = torch.randint(VALUES, (64, LENGTH))
    scores = net(tokens)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % VALUES
        differs = ((net(other) - scores).abs() > 1e-12).any(2).any(0)
        assert differs.tolist() == [place > changed for place in range(LENGTH)]


def test_made_is_a_distribution() -> None:
    net = MADE(3, 2, hidden=8).double()
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    log_prob = net(every).log_softmax(2).gather(2, every[:, :, None]).sum((1, 2))
    assert float(log_prob.logsumexp(0).detach()) == pytest.approx(0.0, abs=1e-12)


def test_masked_mlp_sees_known_tokens_alone() -> None:
    net = MaskedMLP(LENGTH, VALUES, hidden=16).double()
    known = torch.full((1, LENGTH), net.mask_id)
    known[0, 1] = 2
    other = known.clone()
    other[0, 1] = 0
    assert not torch.allclose(net(known), net(other))
    assert net(known).shape == (1, LENGTH, VALUES)


def test_sequence_score_is_the_sum_of_the_scores_of_what_is_known() -> None:
    net, score = MaskedMLP(LENGTH, VALUES), SequenceScore(LENGTH, VALUES)
    score.load_state_dict(net.state_dict())
    tokens = torch.tensor([[0, VALUES, 2, VALUES, 1], [VALUES] * LENGTH])
    scores = net(tokens)[0]
    expected = scores[0, 0] + scores[2, 2] + scores[4, 1]
    torch.testing.assert_close(score(tokens), torch.stack([expected, torch.tensor(0.0)]))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="length must be at least 2"):
        MADE(1, 2)
    with pytest.raises(ValueError, match="num_values must be at least 2"):
        MaskedMLP(4, 1)
