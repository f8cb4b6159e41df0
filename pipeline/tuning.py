"""Which runs of a study are due, given the results so far. `study.py` runs them; nothing is read or written here.

The learning rate of each method is tuned with the first seed, then the best one is run with all seeds.
"""

from dataclasses import dataclass

from pipeline.plan import BASE, Method

EXTENSIONS = 2  # rates beyond the list, where the best one is at its edge
DIVERGED = -1.0  # the F1 of a run whose loss was not finite: below every other


@dataclass(frozen=True)
class Tuning:
    """How far the learning rate of a method is tuned."""

    method: Method
    rates: tuple  # ascending; those of the plan, and the ones beyond them
    missing: tuple  # of these, the ones without a result
    best: float | None  # None: not known yet, all diverged, or the plan gives no rate
    at_edge: str  # "highest" or "lowest" if the best one still is that after the last extension, or else ""

    @property
    def chosen(self):
        """Whether it is known which rate all seeds are run with."""
        return not self.missing and (self.best is not None or not self.rates)


def tune(method, f1_at):
    """The Tuning of a method. f1_at: a function from a rate to its F1, DIVERGED, or None if it was not run yet.

    Of equal F1 the lower rate is the best. A single rate is taken as it is.
    """
    rates = list(method.rates)
    if len(rates) < 2:
        return Tuning(method, tuple(rates), (), rates[0] if rates else None, "")
    steps = {"lowest": rates[0] / rates[1], "highest": rates[-1] / rates[-2]}
    for left in reversed(range(EXTENSIONS + 1)):
        missing = tuple(rate for rate in rates if f1_at(rate) is None)
        if missing:
            return Tuning(method, tuple(rates), missing, None, "")
        best = max(rates, key=f1_at)
        if f1_at(best) == DIVERGED:
            return Tuning(method, tuple(rates), (), None, "")
        edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(best, "")
        if not edge or not left:
            return Tuning(method, tuple(rates), (), best, edge)
        rates = sorted([*rates, float(f"{best * steps[edge]:.4g}")])


@dataclass(frozen=True)
class Survey:
    """What is known of a study at a moment."""

    runs: dict  # {key: (Run, "base", "tuning" or "chosen")} of all runs known so far, in the order of the table
    due: tuple  # Runs that can be made now, the most urgent first
    tunings: tuple
    expected: int  # runs in all, as far as they are known


def survey(plan, f1):
    """The Survey of a plan. f1: a function from a Run to its F1 (out of 100), DIVERGED, or None if it has not ended."""
    stages = {0: list(plan.bases), 1: [], 2: []}
    runs, tunings = {run.key: (run, BASE) for run in plan.bases}, []
    first = plan.seeds[0]
    for method in plan.methods:
        tuning = tune(method, lambda rate, method=method: f1(plan.run(method, rate, first)))
        tunings.append(tuning)
        for rate in tuning.rates or (None,):
            chosen = tuning.chosen and rate == tuning.best
            seeds = plan.seeds if chosen else plan.seeds[:1]
            for seed in seeds:
                run = plan.run(method, rate, seed)
                runs[run.key] = (run, "chosen" if chosen else "tuning")
                stages[1 if seed == first else 2].append(run)
    due = tuple(run for stage in stages.values() for run in stage if f1(run) is None)
    waiting = sum(not tuning.chosen for tuning in tunings)
    return Survey(runs, due, tuple(tunings), len(runs) + waiting * (len(plan.seeds) - 1))
