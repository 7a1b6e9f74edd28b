"""Power: how likely each verdict is for normally distributed members, how many a decision takes, and what they can detect.

The mean of n such members and their standard deviation S are independent, and S = σ k with (n − 1) k² chi-squared
distributed. Given k each verdict is an interval of the mean, so its probability is one integral over k.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from mechsub.statistics.rules import T_TEST, Rules, SuperiorityTest

POWER = 0.8
"""The usual aim of a planned experiment (Cohen 1988)."""
MOST_MEMBERS = 10_000
_AT_ONCE = 32
"""Numbers of members that are tried in one go."""
_TAIL = 7.0
"""In standard deviations: beyond it a normal probability is 0 or 1 but for 1e-12."""
_NO_SPREAD = 1e-150
"""Where the mean itself decides: the square of less is 0."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)

Counts = Float[np.ndarray, " count"]
"""One number for each number of members."""
Pieces = Float[np.ndarray, "piece count"]
"""The same for several integrals."""


@dataclass(frozen=True)
class VerdictProbabilities:
    """How likely each verdict is; they sum to 1."""

    above: float
    equivalent: float
    below: float
    undecided: float


def compute_verdict_probabilities(
    mean: float, spread: float, n: int, rules: Rules, num_judged: int = 1, test: SuperiorityTest = T_TEST
) -> VerdictProbabilities:
    """The probability of every verdict of `judge_effects` for n members drawn from a normal distribution.

    ``mean`` μ and ``spread`` σ (the standard deviation between members) are the true ones, in the unit of the margin Δ. With
    x̄ and S of the sample, h = S/√n, t(p) the upper quantile of Student's t with n − 1 degrees of freedom, α the level of
    superiority, β that of equivalence and m = ``num_judged``:

    - above: x̄ > Δ and x̄ ≥ t(α/m) h (the interval's own bound, x̄ > t(α) h, follows)
    - equivalent: |x̄| ≤ Δ − t(β/m) h
    - below: x̄ < −Δ − t(α) h and x̄ ≤ −t(α/m) h

    No two can hold at once, as levels are under 1/2, so the order in which they are tried changes nothing. α/m is the
    strictest step of Holm's correction: beside other effects that are decided too, a decision is more likely than this. For
    another superiority test than t, a sign flip say, *above* and *below* are what the t test would give, and impossible where
    ``test.smallest_p`` is over α/m: an approximation. Under ``rules.minimum_members`` members all of it is *undecided*.
    No unit, in [0, 1], with an error under 1e-8. All NaN where the mean or the spread is NaN.

    Source: Phillips 1990, Journal of Pharmacokinetics and Biopharmaceutics 18, "Power of the two one-sided tests procedure in
    bioequivalence"; Schuirmann 1987, the same journal 15.

    Raises:
        ValueError: a negative spread, a negative margin, nothing judged, a level that is not between 0 and 1/2.
    """
    _check(spread, rules, num_judged)
    if np.isnan(mean) or np.isnan(spread):
        return VerdictProbabilities(np.nan, np.nan, np.nan, np.nan)
    above, equivalent, below = (float(found[0]) for found in _probabilities(mean, spread, (n,), rules, num_judged, test))
    return VerdictProbabilities(above, equivalent, below, max(0.0, 1 - above - equivalent - below))


def members_to_decide(
    values: Float[np.ndarray, " member"],
    rules: Rules,
    num_judged: int = 1,
    test: SuperiorityTest = T_TEST,
    power: float = POWER,
) -> int | None:
    """The smallest larger number of members that gives some decisive verdict with this power; None over 10,000.

    It takes the mean and the standard deviation of the members seen as the true ones and the strictest step of Holm's
    correction, as `compute_verdict_probabilities` does: a planning figure, not a promise. ``values`` in the unit of the margin;
    NaN does not count. None too for fewer than 2 members, which have no standard deviation. The numbers tried first lie up to
    a third apart, then ever closer: a power that is reached and lost again between two of them is not seen.

    Raises:
        ValueError: a power that is not between 0 and 1, and as `compute_verdict_probabilities`.
    """
    known = values[np.isfinite(values)]
    _check_power(power)
    if len(known) < 2:
        return None
    mean, spread = float(known.mean()), float(known.std(ddof=1))
    _check(spread, rules, num_judged)

    before, tried = len(known), _spread_out(len(known), MOST_MEMBERS)
    while tried:
        decided = np.sum(_probabilities(mean, spread, tried, rules, num_judged, test), axis=0) >= power
        if not decided.any():
            return None
        first = int(np.argmax(decided))
        before, found = tried[first - 1] if first else before, tried[first]
        if found == before + 1:
            return found
        tried = _spread_out(before, found)
    return None


def smallest_detectable_effect(
    spread: float, n: int, rules: Rules, num_judged: int = 1, power: float = POWER, test: SuperiorityTest = T_TEST
) -> float:
    """The true effect that n members with this standard deviation call *above* with this power.

    In the unit of the margin, and of ``spread``; over the margin where power is over 1/2. Infinite where n members cannot say
    *above* at all: under ``rules.minimum_members``, or where ``test`` has no p that is small enough. NaN for a spread of NaN.

    Source: as `compute_verdict_probabilities`, of which this is the inverse in the mean.

    Raises:
        ValueError: a power that is not between 0 and 1, and as `compute_verdict_probabilities`.
    """
    _check(spread, rules, num_judged)
    _check_power(power)
    if np.isnan(spread):
        return float("nan")
    if not _can_be_above((n,), rules, num_judged, test)[0]:
        return float("inf")
    if spread < _NO_SPREAD:
        return rules.margin
    error = spread / np.sqrt(n)

    def excess(errors: float) -> float:
        mean = rules.margin + errors * error
        return float(_probabilities(mean, spread, (n,), rules, num_judged, test)[0][0]) - power

    most = _TAIL
    while excess(most) < 0:
        most *= 2
    return float(rules.margin + optimize.brentq(excess, -40.0, most, xtol=1e-9) * error)


def _probabilities(
    mean: float, spread: float, counts: tuple[int, ...], rules: Rules, num_judged: int, test: SuperiorityTest
) -> tuple[Counts, Counts, Counts]:
    """Of *above*, *equivalent* and *below*, at every number of members."""
    n = np.maximum(np.array(counts, dtype=float), 2.0)
    margin = rules.margin
    if spread < _NO_SPREAD:
        found = [np.full(len(n), float(is_so)) for is_so in (mean > margin, abs(mean) < margin, mean < -margin)]
    else:
        sample = _Sample(n - 1)
        interval = _quantiles(counts, rules.level)
        superior = _quantiles(counts, rules.level / num_judged)
        equal = _quantiles(counts, rules.equivalence_level / num_judged)
        scale = np.sqrt(n) / spread
        with np.errstate(over="ignore"):  # infinitely many standard errors of the mean are as good as many
            shift, limit, room = mean * scale, margin * scale, (margin - mean) * scale
        zero, infinite = np.zeros(len(n)), np.full(len(n), np.inf)
        # Up to these k it is the margin that decides, beyond them the test; judged alone, it never does for *below*.
        flat, turn = limit / superior, np.divide(limit, superior - interval, out=infinite.copy(), where=superior > interval)
        narrow = limit / equal  # beyond this k nothing is equivalent
        falling = sample.integrate(
            np.stack([shift, room, limit + shift, -shift - limit, -shift]),
            np.stack([superior, equal, equal, interval, superior]),
            np.stack([flat, zero, zero, zero, turn]),
            np.stack([infinite, narrow, narrow, turn, infinite]),
        )
        above = sample.below(flat) * special.ndtr(-room) + falling[0]
        equivalent = falling[1] + falling[2] - sample.below(narrow)
        below = falling[3] + falling[4]
        found = [np.clip(probability, 0.0, 1.0) for probability in (above, equivalent, below)]
    has_verdict = np.array(counts) >= max(rules.minimum_members, 2)
    one_sided = _can_be_above(counts, rules, num_judged, test)
    return found[0] * one_sided, found[1] * has_verdict, found[2] * one_sided


class _Sample:
    """The distribution of k = S/σ, at every number of degrees of freedom."""

    def __init__(self, df: Counts) -> None:
        self.df = df
        root = np.sqrt(df)
        self.low, self.high = np.maximum(0.0, 1 - _TAIL / root), 1 + _TAIL / root
        self.constant = np.log(root) - (df / 2 - 1) * np.log(2) - special.gammaln(df / 2)

    def below(self, k: Float[np.ndarray, "*pieces count"]) -> Float[np.ndarray, "*pieces count"]:
        """The probability of a smaller k."""
        with np.errstate(over="ignore"):  # infinite is right
            found: Float[np.ndarray, "*pieces count"] = special.gammainc(self.df / 2, self.df * np.square(k) / 2)
        return found

    def integrate(self, offset: Pieces, slope: Pieces, start: Pieces, stop: Pieces) -> Pieces:
        """The integrals of Φ(offset − slope k) over k from start to stop, for positive slopes.

        Where Φ is 1 it is a chi-squared probability; only where it falls is there something to sum.
        """
        falls, fallen = (np.clip((offset + side * _TAIL) / slope, start, stop) for side in (-1, 1))
        certain = self.below(falls) - self.below(start)
        falls, fallen = np.clip(falls, self.low, self.high), np.clip(fallen, self.low, self.high)
        half = (fallen - falls)[..., None] / 2
        k = falls[..., None] + half * (1 + _NODES)
        df = self.df[:, None]
        root_k = np.sqrt(df) * k
        log_density = special.xlogy(df - 1, root_k) - root_k**2 / 2 + self.constant[:, None]
        integrand = np.exp(log_density) * special.ndtr(offset[..., None] - slope[..., None] * k)
        found: Pieces = certain + (half * integrand) @ _WEIGHTS
        return found


@lru_cache(maxsize=2048)
def _spread_out(before: int, last: int) -> tuple[int, ...]:
    """Numbers of members from ``before`` + 1 to ``last``, both of them and others between, by about equal ratios."""
    ratios = np.geomspace(before + 1, last, _AT_ONCE) if before < last else np.array([])
    return tuple(sorted({int(number) for number in ratios.round()}))


@lru_cache(maxsize=2048)
def _quantiles(counts: tuple[int, ...], level: float) -> Counts:
    """Upper quantiles of Student's t."""
    quantiles: Counts = -special.stdtrit(np.maximum(np.array(counts, dtype=float), 2.0) - 1, level)
    return quantiles


def _can_be_above(counts: tuple[int, ...], rules: Rules, num_judged: int, test: SuperiorityTest) -> np.ndarray:
    """Whether the rules and the superiority test leave room for a one-sided verdict."""
    least = max(rules.minimum_members, 2)
    return np.array([n >= least and test.smallest_p(n) <= rules.level / num_judged for n in counts])


def _check(spread: float, rules: Rules, num_judged: int) -> None:
    if spread < 0 or rules.margin < 0 or num_judged < 1:
        raise ValueError(
            f"a spread of {spread}, a margin of {rules.margin} and {num_judged} judged: "
            "the first two must be 0 or more, the last 1 or more"
        )
    if not (0 < rules.level < 0.5 and 0 < rules.equivalence_level < 0.5):
        raise ValueError(f"levels lie between 0 and 1/2, not {rules.level:g} (superiority), {rules.equivalence_level:g}")


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise ValueError(f"power lies between 0 and 1, not {power}")
