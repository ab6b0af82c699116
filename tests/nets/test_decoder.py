"""The decoder sees the past alone."""

import pytest
import torch

from trimtab.nets import Decoder


def test_a_score_depends_on_its_own_and_earlier_tokens():
    model = Decoder(7, context=6).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, 3] = 0
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3], after[0, 3])
    assert not torch.allclose(before[0, 4], after[0, 4])


def test_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="tokens must be at most 6 long"):
        Decoder(7, context=6)(torch.zeros(1, 7, dtype=torch.int64))


def test_an_untrained_model_is_about_uniform():
    torch.manual_seed(0)
    scores = Decoder(50, context=8)(torch.randint(50, (4, 8)))
    assert scores.log_softmax(-1).exp().max() < 0.2
