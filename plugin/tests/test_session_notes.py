"""Many tests in one session: which regressions stand after Holm's correction."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from plugin.tests.made_up import make_baseline, make_round, make_run
from sparkgauge.gate import Measurement, Policy, baseline_quantity, samples_of
from sparkgauge.records import Verdict
from sparkgauge.report.session_notes import FAMILY_LEVEL, Family, family_lines, family_of


def verdict(status: Any, p_value: float | None = None) -> Verdict:
    return Verdict(
        status,
        "runtime_seconds",
        "lower",
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.1,
        0.95,
        5,
        5,
        "f",
        "",
        "",
        False,
        p_value=p_value,
    )


def family(*verdicts: tuple[str, Any, float | None]) -> Family:
    return family_of([(test, "trained", verdict(status, p)) for test, status, p in verdicts])


def test_the_family_is_stated_with_what_does_not_stand() -> None:
    quiet: list[tuple[str, Any, float | None]] = [(f"t{i}", "match", None) for i in range(37)]
    lines = family_lines(family(("a", "regressed", 1e-6), ("b", "regressed", 2e-4), ("c", "regressed", 0.02), *quiet))
    assert lines[0] == "3 of 40 tests regressed; after Holm's correction 2 at family level 1 %"
    assert lines[1] == "  not after the correction: c (adjusted p = 0.76)"


def test_a_test_with_several_comparisons_counts_once() -> None:
    found = family(("a", "regressed", 0.004), ("a", "match", None), ("b", "match", None))
    assert (found.tests, found.regressed) == (2, ("a",))
    assert found.adjusted == (0.016,) and found.kept == ()  # 2 comparisons of 2 tests


def test_little_to_say() -> None:
    assert family_lines(family(("a", "regressed", 1e-6))) == []
    assert family_lines(family(("a", "match", None), ("b", "improved", None))) == []
    assert family(("a", "missing", None), ("b", "not_comparable", None), ("c", "generated", None)).tests == 0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_more_tests_never_help_a_regression(p_values: list[float]) -> None:
    verdicts: list[tuple[str, Any, float | None]] = [(f"t{i}", "regressed", p) for i, p in enumerate(p_values)]
    alone, more = family(*verdicts), family(*verdicts, ("other", "match", None))
    assert set(more.kept) <= set(alone.kept)
    assert all(p <= FAMILY_LEVEL for p, test in zip(alone.adjusted, alone.regressed, strict=True) if test in alone.kept)


def test_p_values_of_the_gate_agree_with_its_verdicts() -> None:
    """A regression at confidence 0.95 has a one-sided p-value of at most 2.5 %, and a clearer one a smaller."""
    found = []
    for factor in (1.15, 1.2, 1.5):
        rounds = [make_round(seed, factor * (10.0 + seed / 10)) for seed in range(1, 5)]
        quantity = baseline_quantity(make_baseline(), "runtime_seconds", file="f", policy=Policy())
        one = Measurement(samples_of(make_run(*rounds), "runtime_seconds")) <= quantity
        assert one.status == "regressed" and one.p_value is not None
        found.append(one.p_value)
    assert 0.025 > found[0] > found[1] > found[2] > 0.0
