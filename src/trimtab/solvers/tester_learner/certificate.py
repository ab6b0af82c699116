"""The outcome of the tests that a fit makes of its own assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

SAMPLE_SIZE = "sample size"
"""How the names of the sample-size tests begin."""


class RejectedError(RuntimeError):
    """Predictions were asked of a fit whose data failed the tests."""


class RejectionWarning(UserWarning):
    """The data of a fit failed the tests."""


@dataclass(frozen=True)
class CertificateTest:
    """One test: passed if the statistic is at most the threshold.

    Attributes:
        name: what is tested.
        statistic: the worst found over what the test compares.
        threshold: the Gaussian value with its tolerance and the simultaneous bound on chance, in the same unit.
        detail: where the worst was found.
    """

    name: str
    statistic: float
    threshold: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the statistic is at most the threshold."""
        return self.statistic <= self.threshold


@dataclass(frozen=True)
class HalfspaceCertificate:
    """The outcome of every test of a fit.

    Attributes:
        tests: in the order they were made.
        angle_factor: largest ratio, over angles from the band's width to 45 degrees, of `disagreement_bound` at the
            output to the angle: a halfspace at angle $\\theta$ differs on at most `angle_factor` times $\\theta$ of the
            test half. On Gaussian samples the share is $1/\\pi$ of the angle, and the bound about twice the angle.
        enough_samples: how many samples the sample-size tests ask for at the `epsilon` of the fit.
        least_epsilon: the least `epsilon` at which the samples of the fit would be enough; infinity where there are too
            few for any.
    """

    tests: tuple[CertificateTest, ...]
    angle_factor: float
    enough_samples: int
    least_epsilon: float

    @property
    def accepted(self) -> bool:
        """Whether all tests passed."""
        return not self.failed

    @property
    def failed(self) -> tuple[CertificateTest, ...]:
        """The tests that did not pass."""
        return tuple(test for test in self.tests if not test.passed)

    @property
    def only_too_few(self) -> bool:
        """Whether there were too few samples to tell, and nothing in them speaks against the assumptions."""
        return bool(self.failed) and all(test.name.startswith(SAMPLE_SIZE) for test in self.failed)

    @property
    def remedy(self) -> str:
        """What more samples, or a larger error aimed at, would take to pass the sample-size tests."""
        more = f"{self.enough_samples:,} samples are enough"
        if not math.isfinite(self.least_epsilon):
            return more
        return f"{more}, or these with epsilon = {self.least_epsilon:.2g}"

    def __str__(self) -> str:
        rows = [f"{'test':<36} {'statistic':>10} {'threshold':>10}"]
        for test in self.tests:
            word = "passed" if test.passed else "FAILED"
            rows.append(f"{test.name:<36} {test.statistic:>10.4g} {test.threshold:>10.4g}  {word}  {test.detail}")
        if self.only_too_few:
            rows.append(f"too few samples to tell, and no test of them failed: {self.remedy}")
        return "\n".join(rows)
