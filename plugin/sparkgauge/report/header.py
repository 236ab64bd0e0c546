"""What pytest prints after collection when a session will measure: cluster, data and machine, before hours pass."""

from __future__ import annotations

from sparkgauge import environment, nvml
from sparkgauge.session import GaugeSession


def header_lines(session: GaugeSession, *, has_other_spark_fixtures: bool) -> list[str]:
    """Return the lines; data is looked for here, so that a wrong path ends the run before anything is trained."""
    config = session.config
    dataset = session.dataset()
    identity = dataset.identity
    size = f"{config.executors} executor{'s' if config.executors > 1 else ''} x {config.cores_per_executor} core(s)"
    lines = [
        f"sparkgauge: profile {config.profile}, {config.master or 'embedded'} cluster, {size}, "
        f"baselines in {config.baselines_folder}",
        f"sparkgauge: {environment.describe(session.driver_environment)}",
        f"sparkgauge: data {identity.name} ({identity.kind}), {identity.train_count} + {identity.test_count} images, "
        f"{identity.digest[:12]}",
    ]
    if dataset.notice:
        lines.append(f"sparkgauge: {dataset.notice}")
    if config.injections:
        slowed = ", ".join(f"{phase} by {fraction:.0%}" for phase, fraction in config.injections.items())
        lines.append(f"sparkgauge: SLOWED DOWN ON PURPOSE: {slowed} (--gauge-inject)")
    if nvml.played_devices():
        lines.append(f"sparkgauge: THE GPUS ARE PLAYED, from a file ({nvml.PLAYED_VARIABLE}): nothing trains on them")
    if has_other_spark_fixtures:
        lines.append(
            "sparkgauge: pytest-spark is installed too and also defines the fixture spark_session, on a cluster of its "
            "own that keeps this one from starting: switch one off with -p no:spark or -p no:sparkgauge"
        )
    return lines
