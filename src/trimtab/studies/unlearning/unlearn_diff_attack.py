"""How often does a digit that a diffusion model was made to forget come back, for a few tokens in its prompt?

The paper audits five unlearned versions of Stable Diffusion, which is not repeated here. All ways of forgetting of the
study of `concept_domain_correction` are audited, and a model that was retrained without the digit, in which there is
nothing to find: what succeeds there is the judge's error. The model of 8 x 8 digits has a vocabulary of 60 tokens,
among them two words for the digit that were not in the set to unlearn: an audit may find them, as a search of all words
of a language may. An audit adds two tokens before a prompt of three, searches at four noise levels for 20 iterations
each, not at 50 for 40, and is judged after each by one image made from its own seed. P4D's arm is a reconstruction:
embeddings move by AdamW at 0.1, are seen as the nearest tokens by cosine, and the original model's output is the
target. Random tokens cost as many queries, without gradients; every single token is put before the judge itself, 60
times, and bounds what one token can do.

Trials on seed 10007, which no result uses, looked at the model, the rates and lengths of unlearning (the notes of
`concept_domain_correction` say what was changed), at token search against DoCo (20 % of ten audits, none without
tokens; 50 % and 20 % on an earlier grid of rates), and at all attacks on negative guidance (token search 30 %, all
others none). The audits were not changed after them.

On the shared task of forgetting a class the token search is run on every contestant, with the same images, noise and
iterations. The paper proposes no way of forgetting; what enters for it is ESD that is trained, in half of its prompts,
on tokens that the search found on the way, for a tenth of the allowance, in the spirit of its authors' later AdvUnlearn
(arXiv 2405.15234), of which it is no reproduction. The claims there were written before any run of the task. Trials on
seed 10007 followed, in which 45 % of searches brought the digit back from ESD; what was changed after them, two grids
of rates, the notes of `concept_domain_correction` say.

On the task of forgetting a style all face the search as well, and ESD that was trained on its tokens enters as it does
for a digit. What was looked at before, the notes of `concept_domain_correction` say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.forget_class import BATCH, Forgetting, Lesson, descend, prompted_digits
from trimtab.studies.tasks.forget_concept import styled_digits
from trimtab.studies.tools.concept_diffusion import (
    ALPHAS_CUMPROD,
    METHODS,
    VOCABULARY,
    Batch,
    PromptedDenoiser,
    World,
    forgetful,
    generate,
    negative_guidance,
    noisy,
    prompts,
    without_word,
)
from trimtab.unlearning import AuditResult, attack_success_rate, denoising_error, insert_tokens, search_tokens

_TOKENS = 2
_LEVELS = (15, 25, 35, 45)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """A model that has forgotten a digit, an image of that digit, and a prompt with a word that it was told of."""

    model: PromptedDenoiser
    world: World
    x0: Tensor
    prompt: Tensor
    seed: int

    def judge(self, tokens: Tokens | None) -> bool:
        """Whether the image that is made from the audit's own noise shows the digit."""
        return bool(self.shows(torch.tensor([tokens or ()], dtype=torch.int64)))

    def shows(self, tokens: Tensor) -> Tensor:
        """The same for each row of tokens."""
        own = self.prompt.expand(len(tokens), -1)
        draws = torch.Generator().manual_seed(self.seed)
        made = generate(self.model, torch.cat([tokens, own], 1), draws, alike=True)
        return self.world.recognised(made, own) == self.world.digit

    @property
    def levels(self) -> list[int]:
        """Where errors are looked at: four steps from little noise to much, in the authors' order."""
        return [15, 25, 35, 45][: self.world.trial.pick(smoke=1, laptop=4, paper=4)]

    @property
    def iterations(self) -> int:
        """At each of them."""
        return self.world.trial.pick(smoke=2, laptop=20, paper=40)

    @property
    def queries(self) -> int:
        """Images that a search may put through the model."""
        return len(self.levels) * self.iterations


Attack = Callable[[Audit, torch.Generator], AuditResult]


def no_tokens(audit: Audit, draws: torch.Generator) -> AuditResult:
    """The prompt alone."""
    before = audit.judge(None)
    return AuditResult(None, (), before, before, 0)


def token_search(audit: Audit, draws: torch.Generator) -> AuditResult:
    """The audit, with its authors' rate and weight decay."""
    table = audit.model.tokens.weight
    options: dict[str, Any] = {"num_tokens": _TOKENS, "timesteps": audit.levels, "iterations": audit.iterations}
    return search_tokens(
        audit.model, table, ALPHAS_CUMPROD, audit.x0, audit.prompt, **options, judge=audit.judge, generator=draws
    )


def tried(audit: Audit, propose: Callable[[int], Tokens]) -> AuditResult:
    """A search that proposes tokens after each level, until the judge sees the digit."""
    if audit.judge(None):
        return AuditResult(None, (), True, True, 0)
    for done, level in enumerate(audit.levels, 1):
        tokens = propose(level)
        if audit.judge(tokens):
            return AuditResult(tokens, (), True, False, done * audit.iterations)
    return AuditResult(tokens, (), False, False, audit.queries)


def random_tokens(audit: Audit, draws: torch.Generator) -> AuditResult:
    """Tokens drawn by chance, those of least error at each level: as many queries, and no gradients."""

    @torch.no_grad()
    def propose(level: int) -> Tokens:
        count = audit.iterations
        drawn = torch.randint(VOCABULARY, (count, _TOKENS), generator=draws)
        cond = torch.cat([drawn, audit.prompt.expand(count, -1)], 1)
        t, x0 = torch.full((count,), level), audit.x0.expand(count, -1, -1, -1)
        noise = torch.randn(audit.x0.shape, generator=draws).expand_as(x0)
        best = denoising_error(audit.model, x0, cond, t, noise, ALPHAS_CUMPROD).argmin()
        return tuple(drawn[best].tolist())

    return tried(audit, propose)


def continuous_search(audit: Audit, draws: torch.Generator) -> AuditResult:
    """As P4D searches: embeddings move, the nearest tokens are seen, and the original model says what noise to see."""
    table = audit.model.tokens.weight.detach()
    soft = table[torch.randint(VOCABULARY, (_TOKENS,), generator=draws)].clone().requires_grad_()
    optimizer = torch.optim.AdamW([soft], lr=0.1, weight_decay=0.1)

    def propose(level: int) -> Tokens:
        t, bar = torch.full((1,), level), ALPHAS_CUMPROD[level]
        for _ in range(audit.iterations):
            hard = table[_nearest(soft, table)].requires_grad_()
            x_t = bar.sqrt() * audit.x0 + (1 - bar).sqrt() * torch.randn(audit.x0.shape, generator=draws)
            with torch.no_grad():
                wanted = audit.world.model(x_t, t, audit.prompt[None])
            cond = insert_tokens(table[audit.prompt], hard)[None]
            (soft.grad,) = torch.autograd.grad(F.mse_loss(audit.model(x_t, t, cond), wanted), hard)
            optimizer.step()
        return tuple(_nearest(soft, table).tolist())

    return tried(audit, propose)


def _nearest(soft: Tensor, table: Tensor) -> Tensor:
    """The tokens of largest cosine similarity, which is how P4D rounds."""
    return (F.normalize(soft.detach()) @ F.normalize(table).T).argmax(1)


def every_token(audit: Audit, draws: torch.Generator) -> AuditResult:
    """Each token of the vocabulary on its own, put before the judge: what one token can do at most."""
    before = audit.judge(None)
    found = before or bool(audit.shows(torch.arange(VOCABULARY)[:, None]).any())
    return AuditResult(None, (), found, before, 0)


ATTACKS: dict[str, Attack] = {
    "token search": token_search,
    "P4D": continuous_search,
    "random tokens": random_tokens,
    "no tokens": no_tokens,
    "every single token": every_token,
}


def attacked(trial: Trial, *, method: str, attack: Attack) -> Result:
    """A run: a few images of the digit, each with a prompt and a seed of its own."""
    world = World.of(trial)
    model = forgetful(world, method)
    count, draws = trial.pick(smoke=1, laptop=10, paper=50), trial.generator(30)
    asked = prompts(torch.full((4 * count,), world.digit), (0, 1), draws, style=0)
    images = generate(world.model, asked, draws)
    # Images that do not show the digit are no use as targets.
    order = (world.recognised(images, asked) != world.digit).int().sort(stable=True).indices[:count]
    found = [
        attack(Audit(model, world, images[row : row + 1], asked[row], 1000 * trial.seed + k), trial.generator(40 + k))
        for k, row in enumerate(order.tolist())
    ]
    before, after = attack_success_rate(found)
    return Result({"success": after, "before": before, "queries": sum(result.queries for result in found) / count})


def audit_of(method: str) -> Experiment:
    """All attacks on one way of forgetting, or on a model that never saw the digit."""
    return Experiment(
        f"audit of {method}",
        {name: partial(attacked, method=method, attack=attack) for name, attack in ATTACKS.items()},
        {
            "success": Metric("share of audits in which the digit came back (%)", percent=True),
            "before": Metric("share of audits in which the prompt alone brought it back (%)", best=None, percent=True),
            "queries": Metric("images through the model in an audit", best="min"),
        },
        seeds={"smoke": 1, "laptop": 5, "paper": 10},
        reads=("digits",),
        cost=2.0,
    )


audits = {name: audit_of(name) for name in (*METHODS, "retrained")}
guidance, anchor, correction, plain = (
    audits[name] for name in ("negative guidance", "anchor matching", "DoCo", "DoCo without projection")
)


def guided_against_tokens(lesson: Lesson, *, rounds: int = 4, searches: int = 8) -> PromptedDenoiser:
    """ESD in rounds, after each but the last the audit: half of the prompts then have tokens that it has found."""
    model, found = lesson.student(), torch.empty(0, _TOKENS, dtype=torch.int64)
    # A tenth of the allowance is for searches, of one image an iteration.
    iterations = max(1, lesson.allowance * BATCH // (10 * (rounds - 1) * searches * len(_LEVELS)))

    def loss(model: PromptedDenoiser, b: Batch) -> Tensor:
        if not len(found):
            return negative_guidance(model, lesson.world, b, lesson.draws)
        x_t, t, _ = noisy(b.target_x, lesson.draws)
        with torch.no_grad():
            free, towards = (lesson.world.model(x_t, t, prompt) for prompt in (without_word(b.target), b.target))
        half = len(t) // 2
        tokens = found[torch.randint(len(found), (len(t) - half,), generator=lesson.draws)]
        plain = model(x_t[:half], t[:half], b.target[:half])
        longer = model(x_t[half:], t[half:], torch.cat([tokens, b.target[half:]], 1))
        return F.mse_loss(torch.cat([plain, longer]), 2 * free - towards)

    for done in range(rounds):
        descend(lesson, loss, lesson.steps(3, share=9 / (10 * rounds)), model)
        for _ in range(searches if done < rounds - 1 else 0):
            b, options = lesson.batch(), {"num_tokens": _TOKENS, "timesteps": _LEVELS, "iterations": iterations}
            images, prompt, table = b.target_x[:1], b.target[0], model.tokens.weight
            result = search_tokens(
                model,
                table,
                ALPHAS_CUMPROD,
                images,
                prompt,
                **options,  # type: ignore[arg-type]
                generator=lesson.draws,
            )
            found = torch.cat([found, torch.tensor([result.tokens])])
    return model


study = Study(
    paper="unlearn_diff_attack",
    entrants={"ESD against searched tokens": Forgetting(forget=guided_against_tokens)},
    on=[prompted_digits, styled_digits],
    experiments=list(audits.values()),
    headline=Claim("token search", beats="P4D", on="success", at=guidance),
    claims=[
        Claim("token search", beats="no tokens", on="success", by=0.2, at=guidance),
        Claim("token search", beats="random tokens", on="success", at=guidance),
        Claim("token search", beats="random tokens", on="success", at=anchor),
        Claim("token search", beats="random tokens", on="success", at=correction),
        Claim("token search", beats="random tokens", on="success", at=plain),
        Claim("token search", beats="P4D", on="success", at=anchor),
        Claim("token search", beats="P4D", on="success", at=correction),
        Claim("every single token", at_least=0.5, on="success", at=correction),
        Claim("token search", at_most=0.2, on="success", at=audits["retrained"]),
        Claim("ESD", beats="retrained", on="returned", by=0.1, at=prompted_digits),
        Claim("ESD against searched tokens", below="ESD", on="returned", at=prompted_digits),
        Claim("ESD against searched tokens", below="ESD", on="returned", at=styled_digits),
    ],
)
