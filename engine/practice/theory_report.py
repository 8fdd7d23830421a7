"""The recipe of the theory: its figures, and a check of its formulas by fitted classifiers.

Called by jobs.py for recipes of kind `theory`. A curve is computed in milliseconds; the check draws
and fits until each mean error is known to the share that the recipe asks for. Its settings are
written one by one, so an interrupted run goes on.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator
from scipy import stats

from etude.core.config import Config, option
from etude.core.files import read_json, write_json_atomic
from etude.core.log import Log
from etude.core.recipe import Recipe

from .theory import Cosines, Rule, best_ridge, grow, limit_error, simulate

Show = Callable[[dict[str, Any]], None]
RULES = ("hard", "easy", "soft")
POINTS = 29  # of a curve, four an octave: the page smooths curves of 40 points and more


def _within(name: str, values: list[float], above: float, most: float) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one number")
    wrong = next((value for value in values if not above < value <= most), None)
    if wrong is not None:
        raise ValueError(f"{name} holds {wrong:g}: give numbers above {above:g}, up to {most:g}")


class CheckConfig(Config):
    """Settings that are drawn and fitted beside the formulas; every combination is one."""

    dimensions: int = option(400, "numbers in an example", gt=2)
    phi: list[float] = option([0.1, 0.3, 0.8, 1.5], "dimensions over examples before pruning")
    keep: list[float] = option([0.2, 0.5], "share that hard and easy keep; soft: 1 / sharpness")
    rho: list[float] = option([0.6, 0.95], "cosine of the pruner to the generator")
    ridge: list[float] = option([1e-3, 1e-1], "ridge of the mean")
    share: float = option(0.01, "standard error of a setting over its mean error", gt=0)
    least: int = option(16, "classifiers per setting at least", gt=3)
    most: int = option(400, "classifiers per setting at most", gt=3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least={self.least} is more than most={self.most}: swap them")
        _within("phi", self.phi, 0, self.dimensions)
        _within("keep", self.keep, 0, 1)
        _within("rho", self.rho, -1, 1)
        _within("ridge", self.ridge, 0, 1e9)
        return self

    def settings(self) -> list[tuple[str, float, float, float, float]]:
        """(rule, phi, keep, rho, ridge) of each."""
        return list(itertools.product(RULES, self.phi, self.keep, self.rho, self.ridge))


class ToyConfig(Config):
    """Deliberate practice on the toy problem (`theory.grow`)."""

    margins: list[float] = option([0.1, 0.3, 1.0], "how near to a boundary hard examples are")
    seeds: int = option(20, "pools that means are taken over", gt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _within("margins", self.margins, 0, 10)
        return self


class TheoryRecipe(Recipe):
    """Figures of the theory and its check by simulation."""

    kind: Literal["theory"]
    dimensions: int = option(512, "numbers in an example, of the curves", gt=2)
    keep: list[float] = option([1.0, 0.5, 0.25, 0.1], "shares of hard examples, a curve each")
    rho: float = option(0.9, "cosine of the pruner to the generator, of the first figure")
    sizes: tuple[int, int] = option((128, 16384), "examples after pruning, from and to")
    oversampling_rho: list[float] = option([1.0, 0.95, 0.8], "pruners of the second figure")
    oversampling_size: int = option(1024, "examples after pruning, of the second figure", gt=0)
    map_keep: float = option(0.2, "share kept, of the map", gt=0, lt=1)
    map_pruner: float = option(0.999, "cosine of the pruner to the truth, of the map")
    map_points: int = option(33, "points along a side of the map", gt=1)
    toy: ToyConfig = option(ToyConfig(), "practice on the toy problem")
    check: CheckConfig = option(CheckConfig(), "formulas against fitted classifiers")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _within("keep", self.keep, 0, 1)
        cosines = {"rho": [self.rho], "map_pruner": [self.map_pruner]}
        for name, values in (cosines | {"oversampling_rho": self.oversampling_rho}).items():
            _within(name, values, -1, 1)
        if not 0 < self.sizes[0] < self.sizes[1]:
            raise ValueError(f"sizes={self.sizes} must be two numbers above 0, the smaller first")
        return self


def report(recipe: TheoryRecipe, folder: Path, log: Log, show: Show) -> dict[str, Any]:
    """Compute everything into `figures.json` and `check.json` of a run; returns the result.

    Args:
        show: called with the figures computed so far, under their names.
    """
    figures: dict[str, Any] = {
        "sizes": by_size(recipe),
        "oversampling": by_oversampling(recipe),
        "map": hard_or_easy(recipe),
    }
    show(figures)
    figures["toy"] = toy(recipe.toy, recipe.seed, log)
    show(figures)
    figures["check"] = check(recipe.check, recipe.seed, folder / "check.json", log)
    show(figures)
    write_json_atomic(folder / "figures.json", figures)
    return {name: figures["check"][name] for name in ("settings", "chi_square", "p", "largest_z")}


def by_size(recipe: TheoryRecipe) -> dict[str, Any]:
    """Accuracy of the best ridge over the examples that are left, for each share kept."""
    low, high = np.log2(recipe.sizes)
    sizes = np.exp2(np.linspace(low, high, POINTS))
    cosines, found = Cosines.of_pruner(recipe.rho), {}
    for keep in recipe.keep:
        phi = recipe.dimensions * keep / sizes
        found[f"{keep:g} kept"] = (1.0 - best_ridge(phi, _hard(keep), cosines)[1]).tolist()
    return {"x": sizes.tolist(), "series": found}


def by_oversampling(recipe: TheoryRecipe) -> dict[str, Any]:
    """Accuracy at a fixed number of hard examples over how many were drawn for each."""
    factors, found = np.exp2(np.linspace(0.0, 7.0, POINTS)), {}
    for rho in recipe.oversampling_rho:
        errors = [
            best_ridge(
                recipe.dimensions / (recipe.oversampling_size * factor),
                _hard(1.0 / factor),
                Cosines.of_pruner(rho),
            )[1]
            for factor in factors
        ]
        found[f"pruner {rho:g}"] = (1.0 - np.array(errors)).tolist()
    return {"x": factors.tolist(), "series": found}


def hard_or_easy(recipe: TheoryRecipe) -> dict[str, Any]:
    """Error of easy less that of hard examples, by the generator's quality (rows) and phi."""
    quality = np.cos(np.linspace(0.5 * np.pi, 0.01, recipe.map_points + 1))[1:]
    phi = np.exp(np.linspace(np.log(1e-3), np.log(2.0), recipe.map_points))
    rows = []
    for cosine in quality:
        to_generator = recipe.map_pruner * cosine
        angles = Cosines(to_generator, recipe.map_pruner, cosine)
        errors = [
            best_ridge(phi, Rule(kind, recipe.map_keep), angles)[1] for kind in ("hard", "easy")
        ]
        rows.append((errors[1] - errors[0]).tolist())
    return {"quality": quality.tolist(), "phi": phi.tolist(), "easy_less_hard": rows}


def toy(config: ToyConfig, seed: int, log: Log) -> dict[str, dict[str, list[float]]]:
    """Mean test error after each round, by margin and arm."""
    found: dict[str, dict[str, list[float]]] = {}
    arms = ("static", "frozen", "adaptive")
    with log.progress("practice on the toy", 3 * len(config.margins), unit="arms") as progress:
        for margin in config.margins:
            for arm in arms:
                errors = [
                    grow(arm, margin=margin, seed=seed * 1_000_003 + k) for k in range(config.seeds)
                ]
                found.setdefault(f"{margin:g}", {})[arm] = np.mean(errors, axis=0).tolist()
                progress.advance(1)
    return found


def check(config: CheckConfig, seed: int, path: Path, log: Log) -> dict[str, Any]:
    """The z-score of each setting, and what they are together under N(0, 1)."""
    stated = {"seed": seed, "check": config.model_dump(mode="json")}
    found = read_json(path) if path.exists() else {"of": stated, "rows": []}
    rows = found["rows"] if found["of"] == stated else []
    settings = config.settings()
    with log.progress("fitting classifiers", len(settings), unit="settings") as progress:
        progress.advance(len(rows))
        for number, setting in enumerate(settings[len(rows) :], start=len(rows)):
            rows.append(_measured(config, setting, seed, number))
            write_json_atomic(path, {"of": stated, "rows": rows})
            progress.advance(1)
    z = np.array([row["z"] for row in rows])
    # A mean of n draws over its own standard error has variance (n - 1) / (n - 3).
    draws = np.array([row["repeats"] for row in rows])
    chi_square = float((z**2 * (draws - 3) / (draws - 1)).sum())
    return {
        "settings": len(rows),
        "chi_square": chi_square,
        "p": float(2 * min(stats.chi2.sf(chi_square, len(z)), stats.chi2.cdf(chi_square, len(z)))),
        "largest_z": float(np.abs(z).max()),
        "largest_share": max(row["standard_error"] / row["mean"] for row in rows),
        "rows": rows,
    }


def _measured(config: CheckConfig, setting: tuple, seed: int, number: int) -> dict[str, Any]:
    kind, phi, keep, rho, ridge = setting
    rule = Rule(kind, sharpness=1.0 / keep) if kind == "soft" else Rule(kind, keep)
    cosines = Cosines.of_pruner(rho)
    examples = round(config.dimensions / phi)
    limit = float(limit_error(config.dimensions / examples, ridge, rule, cosines))
    errors = np.empty(0)
    while len(errors) < config.least or (
        len(errors) < config.most and _standard_error(errors) > config.share * errors.mean()
    ):
        block = seed * 1_000_003 + number * 1_009 + len(errors)
        more = simulate(
            config.dimensions, examples, ridge, rule, cosines, repeats=config.least, seed=block
        )
        errors = np.concatenate((errors, more))
    spread = _standard_error(errors)
    return {
        "rule": kind,
        "phi": phi,
        "keep": keep,
        "rho": rho,
        "ridge": ridge,
        "limit": limit,
        "mean": float(errors.mean()),
        "standard_error": spread,
        "repeats": len(errors),
        "z": float((errors.mean() - limit) / spread),
    }


def _standard_error(errors: np.ndarray) -> float:
    return float(errors.std(ddof=1) / np.sqrt(len(errors)))


def _hard(keep: float) -> Rule:
    return Rule("hard", keep) if keep < 1.0 else Rule()
