"""Intervals, comparisons and decisions over raw samples. Pure: no I/O, no state; NumPy and SciPy are imported late.

- :mod:`~sparkgauge.stats.intervals`: t intervals of ratios, differences and means, and what they say about a limit.
- :mod:`~sparkgauge.stats.robust`: trimmed means with winsorised standard errors, autocorrelation.
- :mod:`~sparkgauge.stats.comparison`: two sides at once; speed-ups from interleaved runs.
- :mod:`~sparkgauge.stats.sequential`: pair by pair, the error probability spent over the looks.
- :mod:`~sparkgauge.stats.covariate`: pairs freed of what a reference kernel explains.
- :mod:`~sparkgauge.stats.multiple`: Holm, Benjamini-Hochberg, pooling.
- :mod:`~sparkgauge.stats.accuracy`: accuracy over seeds, convergence.
- :mod:`~sparkgauge.stats.history`: change points and drift.
- :mod:`~sparkgauge.stats.noise`: the reference kernel, comparisons with stored samples.
- :mod:`~sparkgauge.stats.localisation`: phases, executors, work or waiting.
"""

from sparkgauge.stats.accuracy import (
    AccuracyComparison,
    ConvergenceCheck,
    accuracy_noninferiority,
    convergence_check,
    kaplan_meier,
    sd_upper,
    seeds_needed,
)
from sparkgauge.stats.comparison import (
    Comparison,
    Margin,
    compare,
    decide_logs,
    interleaved_interval,
    scaling_efficiency,
)
from sparkgauge.stats.covariate import adjusted
from sparkgauge.stats.history import ChangePoint, Drift, change_points, drift
from sparkgauge.stats.intervals import (
    FEWEST_SAMPLES,
    FIRST_LOOK_SHARE,
    FLAT_SPREAD,
    LOOK_SHARE,
    ROUNDING,
    Better,
    Decision,
    Interval,
    Scale,
    binomial_sd,
    confidence_at_look,
    decide,
    difference_interval,
    margin_limit,
    mean,
    mean_interval,
    next_look,
    ratio_interval,
    speedup_interval,
)
from sparkgauge.stats.localisation import Localisation, PhaseChange, find_straggler, localise, work_or_waiting
from sparkgauge.stats.multiple import Pooled, benjamini_hochberg, holm, pool
from sparkgauge.stats.noise import (
    Normalisation,
    StoredComparison,
    choose_normalisation,
    compare_stored,
    normalise,
)
from sparkgauge.stats.sequential import Outcomes, Plan, SequentialComparison, SequentialStatus, settle_many

__all__ = [
    "FEWEST_SAMPLES",
    "FIRST_LOOK_SHARE",
    "FLAT_SPREAD",
    "LOOK_SHARE",
    "ROUNDING",
    "AccuracyComparison",
    "Better",
    "ChangePoint",
    "Comparison",
    "ConvergenceCheck",
    "Decision",
    "Drift",
    "Interval",
    "Localisation",
    "Margin",
    "Normalisation",
    "Outcomes",
    "PhaseChange",
    "Plan",
    "Pooled",
    "Scale",
    "SequentialComparison",
    "SequentialStatus",
    "StoredComparison",
    "accuracy_noninferiority",
    "adjusted",
    "benjamini_hochberg",
    "binomial_sd",
    "change_points",
    "choose_normalisation",
    "compare",
    "compare_stored",
    "confidence_at_look",
    "convergence_check",
    "decide",
    "decide_logs",
    "difference_interval",
    "drift",
    "find_straggler",
    "holm",
    "interleaved_interval",
    "kaplan_meier",
    "localise",
    "margin_limit",
    "mean",
    "mean_interval",
    "next_look",
    "normalise",
    "pool",
    "ratio_interval",
    "scaling_efficiency",
    "sd_upper",
    "seeds_needed",
    "settle_many",
    "speedup_interval",
    "work_or_waiting",
]
