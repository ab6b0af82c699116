"""What the studies of unlearning forget is not in what they keep, and their shared model sees its prompts."""

from __future__ import annotations

import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tools import concept_diffusion as concepts
from trimtab.studies.tools.network_stack import stacked_cross_entropy
from trimtab.studies.unlearning import d2dgn
from trimtab.studies.unlearning.datamodel_matching import networks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_style_undoes_itself_and_prompts_are_of_the_vocabulary() -> None:
    digits = torch.arange(10).repeat(30)
    prompt = concepts.prompts(digits, (1, 3), seeded())
    assert prompt.shape == (300, 3)
    assert (prompt[:, 0] // concepts.SYNONYMS == digits).all()
    assert set((prompt[:, 0] % concepts.SYNONYMS).tolist()) == {1, 3}
    assert prompt[:, 1].min() == 40
    assert prompt[:, 1].max() == 42
    assert prompt[:, 2].min() >= 43
    assert prompt.max() < concepts.VOCABULARY
    images = torch.randn(300, 1, 8, 8, generator=seeded())
    assert torch.equal(concepts.styled(concepts.styled(images, prompt), prompt), images)
    plain = prompt[:, 1] == 40
    assert torch.equal(concepts.styled(images, prompt)[plain], images[plain])
    assert torch.equal(concepts.without_word(prompt)[:, 0], prompt[:, 2])


def test_embedded_prompts_are_the_prompts() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = concepts.PromptedDenoiser()
    x, t, prompt = torch.randn(4, 1, 8, 8), torch.arange(4), concepts.prompts(torch.arange(4), (0,), seeded())
    torch.testing.assert_close(model(x, t, prompt), model(x, t, model.tokens(prompt)))
    torch.testing.assert_close(model(x, t, prompt), model(x, t, prompt.flip(1)))  # attention sees no order
    assert not torch.allclose(model(x, t, prompt), model(x, t, prompt.roll(1, 0)))


def test_edges_are_shared_out() -> None:
    given = d2dgn.graph(Trial(), "communities")
    parts = [given.retained, given.deleted, given.test, given.others]
    sets = [{(min(u, v), max(u, v)) for u, v in part.T.tolist()} for part in parts]
    assert all(sets)
    assert sum(map(len, sets[:3])) == len(set().union(*sets[:3]))
    assert not sets[3] & set().union(*sets[:3])


def test_what_is_forgotten_is_not_retained_and_networks_of_a_stack_do_not_meet() -> None:
    given = networks.work(Trial(), 0)
    assert not set(given.forget.tolist()) & set(given.retained.tolist())
    assert len(given.forget) + len(given.retained) == len(given.x)
    assert len(given.y[given.forget].unique()) == 1
    stack = given.trained
    loss = stacked_cross_entropy(stack(given.x[:4])[:, :1], given.y[:4])
    loss.backward()
    assert stack.first.grad is not None
    assert stack.first.grad[0].abs().max() > 0
    assert stack.first.grad[1:].abs().max() == 0
