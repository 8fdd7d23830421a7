"""What chosen examples are worth: ridge regression on pruned Gaussian data, in the limit and drawn.

Called by the recipe `practice/theory` and by whoever asks when hard examples help. Data x ~ N(0,
I_d) are labelled sign(x . w_g) by a generator and kept with probability q(x . w_s), where w_s is a
pruner; the sign of ridge regression on what is kept is tested against sign(x . w), the truth. With
d / n -> phi, n counted before pruning, its error is a closed form (Askari-Hemmat et al. 2025, arXiv
2502.15588, as in their appendix: the main text prints another r). The three are unit vectors.

With G ~ N(0, 1), p = E q(G), gamma = E q(G) G^2, rho = w_s . w_g, tau = rho / sqrt(1 - rho^2) and
a ridge lam >= 0 in (X' D X / n + lam):

    beta = 2 E q(G) pdf(tau G)              along = 2 E q(G) G cdf(tau G)
    root = sqrt(a^2 + 4 phi lam)            a = p - phi + lam
    m = (root - a) / (2 phi lam)            m' = m (1 + phi m) / root
    m_s = 1 / (gamma / (1 + phi m) + lam)   m_s' = m_s^2 (1 + gamma phi m' / (1 + phi m)^2)
    r = beta^2 m + along^2 m_s              r' = beta^2 m' + along^2 m_s'
    mean = along m_s (w_s . w) + beta m (w_g . w - rho (w_s . w)) / sqrt(1 - rho^2)
    spread^2 = p phi m' + r' - 2 phi m' r / (1 + phi m)
    error = arccos(mean / spread) / pi

The mean for a truth other than the generator is ours, by the same lemmas. `simulate` draws what the
formulas predict; tests and the recipe's check (`theory_report.py`) compare the
two.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, expit, ndtr, ndtri

Floats = NDArray[np.float64]

_PEAK = 1.0 / np.sqrt(2.0 * np.pi)  # of the normal density
_FAR = 12.0  # beyond it a standard normal has less than 1e-32
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)


@dataclass(frozen=True)
class Rule:
    """Which examples stay, by their distance x . w_s from the pruner's boundary.

    Attributes:
        kind: "hard" keeps the nearest, "easy" the farthest, "random" any; "soft" keeps each with
            probability (4 s (1 - s))^sharpness, s = sigmoid(x . w_s).
        keep: share that stays, in (0, 1]; of "soft" it follows from the sharpness.
        sharpness: of "soft", at least 0.
    """

    kind: Literal["hard", "easy", "random", "soft"] = "random"
    keep: float = 1.0
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep} is not a share: give a number in (0, 1]")
        if self.sharpness < 0.0:
            raise ValueError(f"sharpness={self.sharpness} is negative: give a number from 0 on")

    @property
    def edge(self) -> float:
        """The distance that "hard" keeps up to, and "easy" from."""
        share = self.keep if self.kind == "hard" else 1.0 - self.keep
        return float(ndtri((1.0 + share) / 2.0))

    def probability(self, distance: ArrayLike) -> Floats:
        """Of staying, for distances x . w_s of any shape."""
        far = np.abs(np.asarray(distance, np.float64))
        if self.kind == "random":
            return np.full_like(far, self.keep)
        if self.kind == "soft":
            return (4.0 * expit(far) * expit(-far)) ** self.sharpness
        return (far <= self.edge if self.kind == "hard" else far >= self.edge).astype(np.float64)

    def moments(self, rho: float) -> "Moments":
        """What the error depends on, where the pruner has cosine `rho` to the generator."""
        if not -1.0 <= rho <= 1.0:
            raise ValueError(f"rho={rho} is not a cosine: give a number in [-1, 1]")
        whole = np.array([1.0, 1.0, 2.0 * _PEAK, 2.0 * _PEAK * rho])
        if self.kind == "random":
            return Moments(*(self.keep * whole))
        if self.kind == "soft":
            return Moments(*_integrated(self, rho))
        near = _near(self.edge, rho)
        return Moments(*(near if self.kind == "hard" else whole - near))


@dataclass(frozen=True)
class Moments:
    """Expectations of a rule.

    Attributes:
        p: E q(G), the share that stays.
        gamma: E q(G) G^2.
        across: beta / sqrt(1 - rho^2), which stays finite where the pruner is the generator.
        along: 2 E q(G) G cdf(tau G).
    """

    p: float
    gamma: float
    across: float
    along: float


def _near(edge: float, rho: float) -> Floats:
    """The four moments of keeping |G| <= edge."""
    if np.isinf(edge):
        return np.array([1.0, 1.0, 2.0 * _PEAK, 2.0 * _PEAK * rho])
    width = np.sqrt(1.0 - rho * rho)
    density = _PEAK * np.exp(-0.5 * edge * edge)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = 1.0 if width == 0.0 or edge / width > 40.0 else 2.0 * ndtr(edge / width) - 1.0
        tilted = np.sign(rho) if width == 0.0 else 2.0 * ndtr(rho * edge / width) - 1.0
    if edge == 0.0:
        inside = tilted = 0.0
    p = 2.0 * ndtr(edge) - 1.0
    along = 2.0 * (rho * _PEAK * inside - density * tilted)
    return np.array([p, p - 2.0 * edge * density, 2.0 * _PEAK * inside, along])


def _integrated(rule: Rule, rho: float) -> Floats:
    """The four moments of any rule, by Gauss-Legendre quadrature over the half line."""
    width = np.sqrt(1.0 - rho * rho)
    # cdf(tau g) rises within a few width / rho of zero: a piece of its own.
    steep = min(_FAR, 8.0 * width / max(abs(rho), 1e-12))
    pieces = [(0.0, steep), (steep, _FAR)] if 0.0 < steep < _FAR else [(0.0, _FAR)]
    total = np.zeros(4)
    for low, high in pieces:
        g = low + (high - low) * (_NODES + 1.0) / 2.0
        mass = (high - low) * _WEIGHTS * _PEAK * np.exp(-0.5 * g * g)  # of both signs
        q = rule.probability(g)
        rise = np.sign(rho) if width == 0.0 else erf(rho * g / width / np.sqrt(2.0))
        # pdf(tau g) pdf(g) = pdf(0) pdf(g / width): the same integral over g * width.
        across = 2.0 * _PEAK * rule.probability(width * g)
        total += [(mass * f).sum() for f in (q, q * g * g, across, q * g * rise)]
    return total


@dataclass(frozen=True)
class Cosines:
    """Of the angles between pruner, generator and truth; by default all three are one vector."""

    pruner_generator: float = 1.0
    pruner_truth: float = 1.0
    generator_truth: float = 1.0

    def __post_init__(self) -> None:
        a, b, c = self.pruner_generator, self.pruner_truth, self.generator_truth
        volume = 1.0 + 2.0 * a * b * c - a * a - b * b - c * c  # squared, of the three vectors
        if max(abs(a), abs(b), abs(c)) > 1.0 or volume < -1e-9:
            raise ValueError(f"no three vectors have the cosines {a}, {b} and {c}")

    @classmethod
    def of_pruner(cls, rho: float) -> "Cosines":
        """A generator that is the truth, and a pruner of cosine `rho` to both."""
        return cls(rho, rho, 1.0)


def limit_error(
    phi: ArrayLike, ridge: ArrayLike, rule: Rule, cosines: Cosines = Cosines()
) -> Floats:
    """Share of wrong signs in the limit, in [0, 1].

    Args:
        phi: dimensions over examples before pruning, above 0.
        ridge: lam, at least 0; 0 is the limit of least norm, with its peak of 1/2 at phi = p.
    """
    phi, lam = np.broadcast_arrays(np.asarray(phi, np.float64), np.asarray(ridge, np.float64))
    if (phi <= 0.0).any() or (lam < 0.0).any():
        raise ValueError("phi must be above 0 and ridge at least 0")
    rho, of = cosines.pruner_generator, rule.moments(cosines.pruner_generator)
    beta = of.across * np.sqrt(1.0 - rho * rho)
    # Everything is scaled by s = 1 / (1 + phi m): M = s m, M' = s^2 m', ... which stay finite for
    # lam -> 0 on both sides of the peak. Below it lam m, above it m itself has no cancellation.
    a = of.p - phi + lam
    root = np.sqrt(a * a + 4.0 * phi * lam)
    with np.errstate(divide="ignore", invalid="ignore"):
        m = 2.0 / (root + a)
        lam_m = (root - a) / (2.0 * phi)
        big_m = np.where(a >= 0.0, m / (1.0 + phi * m), lam_m / (lam + phi * lam_m))
        lam_over_s = np.where(a >= 0.0, lam * (1.0 + phi * m), lam + phi * lam_m)
        peak = root == 0.0
        big_m, lam_over_s = np.where(peak, 1.0 / phi, big_m), np.where(peak, 0.0, lam_over_s)
        slope = big_m / root
        big_m_s = 1.0 / (of.gamma + lam_over_s)
        r = beta**2 * big_m + of.along**2 * big_m_s
        growth = phi * (of.p + of.gamma * (of.along * big_m_s) ** 2 - 2.0 * r) + beta**2
        spread = np.sqrt(slope * growth + (of.along * big_m_s) ** 2)
        mean = of.along * big_m_s * cosines.pruner_truth
        mean = mean + of.across * big_m * (cosines.generator_truth - rho * cosines.pruner_truth)
        cosine = np.clip(mean / spread, -1.0, 1.0)
    return np.arccos(cosine) / np.pi


def best_ridge(
    phi: ArrayLike,
    rule: Rule,
    cosines: Cosines = Cosines(),
    *,
    between: tuple[float, float] = (1e-6, 1e2),
) -> tuple[Floats, Floats]:
    """The ridge of least error within bounds, and that error; both of the shape of `phi`.

    A grid over its logarithm, drawn in five times around its best point: to about 1e-5 of the
    logarithm, where the error is flat.
    """
    phi = np.asarray(phi, np.float64)
    low = np.full(phi.shape, np.log(between[0]))
    high = np.full(phi.shape, np.log(between[1]))
    first, last = low[..., None], high[..., None]
    for _ in range(5):
        grid = low[..., None] + (high - low)[..., None] * np.linspace(0.0, 1.0, 33)
        errors = limit_error(phi[..., None], np.exp(grid), rule, cosines)
        at = errors.argmin(-1)[..., None]
        step = grid[..., 1:2] - grid[..., :1]
        centre = np.take_along_axis(grid, at, -1)
        low = np.maximum(centre - step, first)[..., 0]
        high = np.minimum(centre + step, last)[..., 0]
    return np.exp(centre[..., 0]), np.take_along_axis(errors, at, -1)[..., 0]


def directions(dimensions: int, cosines: Cosines) -> tuple[Floats, Floats, Floats]:
    """Unit vectors (d,) of pruner, generator and truth with the given cosines."""
    if dimensions < 3:
        raise ValueError(f"{dimensions} dimensions have no room for three vectors: give 3 or more")
    a, b, c = cosines.pruner_generator, cosines.pruner_truth, cosines.generator_truth
    pruner, generator, truth = np.zeros((3, dimensions))
    pruner[0] = 1.0
    generator[:2] = a, np.sqrt(1.0 - a * a)
    truth[0] = b
    truth[1] = (c - a * b) / generator[1] if generator[1] > 0.0 else 0.0
    truth[2] = np.sqrt(max(1.0 - truth[0] ** 2 - truth[1] ** 2, 0.0))
    return pruner, generator, truth


def simulate(
    dimensions: int,
    examples: int,
    ridge: float,
    rule: Rule,
    cosines: Cosines = Cosines(),
    *,
    repeats: int,
    seed: int,
) -> Floats:
    """The same error of classifiers that are really fitted, (repeats,) in [0, 1].

    Each repeat draws `examples` examples of `dimensions` numbers, prunes them and solves the ridge
    regression; the error of a weight vector is its angle to the truth over pi, without a test set.
    """
    pruner, generator, truth = directions(dimensions, cosines)
    errors = np.empty(repeats)
    for repeat in range(repeats):
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, repeat]))
        x = random.standard_normal((examples, dimensions))
        kept = x[random.random(examples) < rule.probability(x @ pruner)]
        weights = fit(kept, np.sign(kept @ generator), ridge * examples)
        errors[repeat] = angle(weights, truth)
    return errors


def fit(x: Floats, y: Floats, ridge: float) -> Floats:
    """Weights (d,) of (X' X + ridge) w = X' y, solved on the smaller side."""
    count, dimensions = x.shape
    if count >= dimensions:
        return np.linalg.solve(x.T @ x + ridge * np.eye(dimensions), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(count), y)


def angle(weights: Floats, truth: Floats) -> float:
    """Share of N(0, I) that two directions label differently; 1/2 for no weights at all."""
    length = np.linalg.norm(weights) * np.linalg.norm(truth)
    if length == 0.0:
        return 0.5
    return float(np.arccos(np.clip(weights @ truth / length, -1.0, 1.0)) / np.pi)


def grow(
    arm: Literal["static", "frozen", "adaptive"],
    *,
    dimensions: int = 128,
    start: int = 512,
    rounds: int = 8,
    added: int = 256,
    margin: float = 0.3,
    ridge: float = 1e-6,
    seed: int,
) -> Floats:
    """Deliberate practice on the toy problem: the test error after each round, (rounds + 1,).

    Every round adds `added` examples to the pool and fits anew (section 4.2.2 of the paper). Arm
    "static" adds any, "frozen" those within `margin` of the first classifier's boundary, "adaptive"
    within that of the newest's; all start with the same examples. `ridge` is of the sum.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    truth = np.eye(dimensions)[0]
    x = random.standard_normal((start, dimensions))
    weights = first = fit(x, np.sign(x @ truth), ridge)
    errors = [angle(weights, truth)]
    for _ in range(rounds):
        fresh = random.standard_normal((added, dimensions))
        if arm != "static":
            by = first if arm == "frozen" else weights
            by = by / np.linalg.norm(by)
            # An example within the margin: along the boundary's normal a truncated normal.
            share = 2.0 * ndtr(margin) - 1.0
            place = ndtri(0.5 + share * (random.random(added) - 0.5))
            fresh += np.outer(place - fresh @ by, by)
        x = np.concatenate((x, fresh))
        weights = fit(x, np.sign(x @ truth), ridge)
        errors.append(angle(weights, truth))
    return np.array(errors)
