"""Measures the PyTorch figures of docs/performance.md: every ratio side by side in one run, in interleaved rounds.

    python docs/measure_torch.py                      # everything, about half an hour on two cores
    python docs/measure_torch.py scaling overhead     # some of: scaling, overhead, bare, launch, agreement, quick,
                                                      # speedrun, gpu
    SPARKGAUGE_DATA=... python docs/measure_torch.py  # real CIFAR-10 from a folder or archive

Needs the package with its torch extra (for ``launch`` with pandas and pyarrow too), Java 17, and a machine on which
nothing else runs. ``gpu`` needs an NVIDIA GPU and neither Spark nor Java. Prints Markdown.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import measuring
from measuring import EXECUTORS, dataset, interleave, make_job, print_machine, ratio

from sparkgauge import ceiling, ranks, store
from sparkgauge.adapters.torch import launch as torch_launch
from sparkgauge.adapters.torch.by_hand import run_by_hand, thread_limits
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data.cache import write_prepared
from sparkgauge.data.dataset import Dataset
from sparkgauge.data.layouts import Content
from sparkgauge.job import Job
from sparkgauge.models.cifar10 import RECIPES
from sparkgauge.models.flops import achieved_gflops
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS

SHORT_TEST = 200
"""Test images where only training is measured."""
PAIRS = {"scaling": 8, "overhead": 8, "bare": 6, "launch": 6}
"""Interleaved pairs of rounds by section; ``--pairs`` sets them all."""
SCALING_STEPS = {"cifar10_quick": 40, "resnet20": 10, "cifar10_tutorial": 20}
"""Rounds of 4 to 7 s on one core."""
OVERHEAD_STEPS = 80
BARE_STEPS = {"resnet20": 10, "cifar10_tutorial": 24}
AGREEMENT_STEPS = 50
SPEEDRUN_BATCH = 250
SPEEDRUNS = ((0.5, 2.0), (0.5, 3.0), (0.5, 5.0))
"""Width of the network and epochs, in batches that fit into a processor's cache; each is a training of its own, since
the rate falls towards its end."""
GPU_RUNS = 10
TIMEOUT_SECONDS = 3000.0


def main() -> None:
    """Measure the sections named on the command line and print them."""
    sections = {
        "scaling": scaling,
        "overhead": overhead,
        "bare": bare,
        "launch": launch,
        "agreement": agreement,
        "quick": quick,
        "speedrun": speedrun,
        "gpu": gpu,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*sections, []], help="default: all but gpu")
    parser.add_argument("--pairs", type=int, help="interleaved pairs of rounds of every ratio")
    parser.add_argument("--speedruns", nargs="*", help="of section speedrun, as WIDTH:EPOCHS")
    parser.add_argument("--models", nargs="*", default=list(SCALING_STEPS), help="of section scaling")
    arguments = parser.parse_args()
    if arguments.pairs:
        PAIRS.update(dict.fromkeys(PAIRS, arguments.pairs))
    global SPEEDRUNS
    if arguments.speedruns:
        SPEEDRUNS = tuple((float(w), float(e)) for w, _, e in (one.partition(":") for one in arguments.speedruns))
    for model in SCALING_STEPS.keys() - set(arguments.models):
        del SCALING_STEPS[model]
    wanted = arguments.sections or [name for name in sections if name != "gpu"]
    print_machine(spark=wanted != ["gpu"])
    for name in wanted:
        sections[name]()


def scaling() -> None:
    """Print the throughput of two executors of one core over that of one, at equal global batch."""
    data = _short_dataset()
    head = ("training, equal global batch", "1 executor, images/s", "2 executors", "ratio", "exposed communication")
    print(f"| {' | '.join(head)} | CPU seconds of 1 / of both | n |\n| --- | --- | --- | --- | --- | --- | --- |")
    with _cluster() as cluster:
        for model, steps in SCALING_STEPS.items():
            one, two = (
                functools.partial(_on_spark, cluster, make_job(data, model, steps, executors=n)) for n in (1, EXECUTORS)
            )
            two()
            pairs = interleave(one, two, PAIRS["scaling"])
            rates = [[round_.images_per_second for round_ in side] for side in pairs]
            exposed = statistics.median(ranks.exposed(round_) for round_ in pairs[1])
            what = f"{model}, batch {RECIPES[model].global_batch}"
            medians = " | ".join(f"{statistics.median(side):,.0f}" for side in rates)
            count = f"{len(rates[0])} pairs"
            # without what other work on the machine takes: 1 means that two executors compute no more than one
            spent = ratio(*([_step_cpu_seconds(round_) for round_ in side] for side in reversed(pairs)))
            print(
                f"| {what} | {medians} | {ratio(rates[0], rates[1])} | {exposed:.1%} | {spent} | {count} |", flush=True
            )
        limit = ceiling.of_executors(cluster.spark.sparkContext, EXECUTORS, 1, "cpu")
    assert limit
    print(f"\nCeilings of both cores: {limit.gemm_gflops:.0f} GFLOP/s, {limit.memory_gigabytes_per_second:.1f} GB/s")
    for model in SCALING_STEPS:
        print(f"({model}: 1,000 images/s are {achieved_gflops(model, 1000.0):.1f} GFLOP/s)")
    print(flush=True)


def overhead() -> None:
    """Print the training throughput inside Spark over that of the same two processes started by hand."""
    data = _short_dataset()
    job = make_job(data, "cifar10_quick", OVERHEAD_STEPS)
    with _cluster() as cluster:
        inside, by_hand = functools.partial(_on_spark, cluster, job), functools.partial(_by_hand, job)
        inside()
        pairs = interleave(inside, by_hand, PAIRS["overhead"])
    spark, bare = ([one.images_per_second for one in side] for side in pairs)
    print("| training throughput, cifar10_quick, 2 x 1 core | images/s (median) | n |\n| --- | --- | --- |")
    print(f"| executors of Spark | {statistics.median(spark):,.0f} | {len(spark)} |")
    print(f"| the same two processes started by hand | {statistics.median(bare):,.0f} | {len(bare)} |")
    print(f"| Spark / by hand | {ratio(bare, spark)} | {len(bare)} pairs |")
    steps = [[statistics.median(one.executors[0].step_seconds) for one in side] for side in pairs]
    print(f"| by hand / Spark, each round's median step | {ratio(steps[0], steps[1])} | {len(bare)} pairs |")
    spent = [[store.cpu_seconds(one) for one in side] for side in pairs]
    print(
        f"| CPU seconds of the training processes, by hand / Spark | {ratio(*spent)} | {len(bare)} pairs |\n",
        flush=True,
    )


def bare() -> None:
    """Print the adapter's throughput in one process over that of a plain PyTorch loop, on one thread and on two."""
    data = _short_dataset()
    print("| one process, by hand | adapter, images/s | bare loop, images/s | adapter / bare | n |")
    print("| --- | --- | --- | --- | --- |")
    for threads in (1, 2):
        for model, steps in BARE_STEPS.items():
            job = make_job(data, model, steps, executors=1, threads=threads)
            ours = lambda job=job: _by_hand(job).images_per_second  # noqa: E731
            plain = lambda job=job: _in_a_process(_bare_loop, job)  # noqa: E731
            plain()
            pairs = interleave(ours, plain, PAIRS["bare"])
            what = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
            medians = " | ".join(f"{statistics.median(side):,.0f}" for side in pairs)
            print(f"| {what} | {medians} | {ratio(pairs[1], pairs[0])} | {len(pairs[0])} pairs |", flush=True)
    print(flush=True)


def launch() -> None:
    """Print our launch phase beside pyspark's TorchDistributor on the same session, running the same training."""
    data = _short_dataset()
    job = make_job(data, "cifar10_quick", 2)
    with _cluster() as cluster:
        ours = functools.partial(_on_spark, cluster, job)
        theirs = functools.partial(_on_spark, cluster, job, torch_launch.launch_torchdistributor)
        ours(), theirs()
        pairs = interleave(ours, theirs, PAIRS["launch"])
    print("| launch on a warm session, 2 executors | seconds (median) | min - max | n |\n| --- | --- | --- | --- |")
    phases = [[max(executor.phases.launch for executor in one.executors) for one in side] for side in pairs]
    whole = [[one.runtime_seconds for one in side] for side in pairs]
    for name, values in (
        ("launch phase: call to first training step", phases[0]),
        ("the same through TorchDistributor", phases[1]),
        ("whole round of 2 steps and a test", whole[0]),
        ("the same through TorchDistributor", whole[1]),
    ):
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} | {len(values)} |")
    print(
        f"| TorchDistributor's launch / ours | {ratio(phases[0], phases[1])} | | {len(whole[0])} pairs |\n", flush=True
    )


def agreement() -> None:
    """Print how far the losses of one and two executors are apart after 50 steps on the same order of images."""
    data = _short_dataset()
    print("| mean loss of steps 1-50, real CIFAR-10, batch | 1 executor | 2 executors | relative difference |")
    print("| --- | --- | --- | --- |")
    with _cluster() as cluster:
        for model in RECIPES:
            batch = min(100, RECIPES[model].global_batch)
            changes: dict[str, Any] = {"global_batch": batch, "test_every": None}
            jobs = [make_job(data, model, AGREEMENT_STEPS, executors=n, **changes) for n in (1, EXECUTORS)]
            losses = [_on_spark(cluster, job).curve[0].train_loss for job in jobs]
            apart = abs(losses[0] - losses[1]) / losses[0]
            print(f"| {model}, {batch} | {losses[0]:.6f} | {losses[1]:.6f} | {apart:.1e} |", flush=True)
    print(flush=True)


def quick() -> None:
    """Print the runtime and accuracy of the reference training: cifar10_quick, 5000 iterations and all its tests."""
    with _cluster() as cluster:
        done = _on_spark(cluster, make_job(dataset(), "cifar10_quick", 5000, test_every=500))
    accuracies = " ".join(f"{p.accuracy_fraction:.2%}" for p in done.curve if p.accuracy_fraction is not None)
    print("| cifar10_quick, 5000 iterations + 10 tests, 2 executors of one core | |\n| --- | --- |")
    print(f"| training + test | {done.runtime_seconds:.1f} s |")
    print(f"| images/s in training | {done.images_per_second:,.0f} |")
    print(f"| accuracy after 500, 1000, ... 5000 | {accuracies} |\n", flush=True)


def speedrun() -> None:
    """Print what ``speedrun`` reaches in a few epochs on the CPU, and in which time."""
    data = dataset()
    print("| speedrun, 2 executors of one core | seconds, training + test | accuracy | images/s | GFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    with _cluster() as cluster:
        for width, epochs in SPEEDRUNS:
            changes: dict[str, Any] = {"global_batch": SPEEDRUN_BATCH, "options": {"width": width}}
            done = _on_spark(cluster, make_job(data, "speedrun", round(epochs * 50_000 / SPEEDRUN_BATCH), **changes))
            rate = done.images_per_second
            gflops = achieved_gflops("speedrun", rate, {"width": width})
            print(
                f"| width {width:g}, {epochs:g} epochs, batch {SPEEDRUN_BATCH} | {done.runtime_seconds:.0f} | "
                f"{done.accuracy_fraction:.2%} | {rate:,.0f} | {gflops:.0f} |",
                flush=True,
            )
    print(flush=True)


def gpu() -> None:
    """Print accuracies and training seconds of ``speedrun`` and the speed of the other models on one GPU."""
    data = dataset()
    runs = [
        _by_hand(make_job(data, "speedrun", 750, executors=1, device="gpu", seed=seed))
        for seed in range(1, GPU_RUNS + 1)
    ]
    seconds = [sum(one.executors[0].step_seconds) for one in runs]
    accuracies = [one.accuracy_fraction for one in runs]
    print("| speedrun on one GPU, 15 epochs | mean | deviation | min - max | n |\n| --- | --- | --- | --- | --- |")
    spread = f"{statistics.stdev(accuracies):.2%} | {min(accuracies):.2%} - {max(accuracies):.2%}"
    print(f"| accuracy | {statistics.fmean(accuracies):.2%} | {spread} | {len(runs)} |")
    spread = f"{statistics.stdev(seconds):.2f} | {min(seconds):.2f} - {max(seconds):.2f}"
    print(f"| training seconds after the first step | {statistics.fmean(seconds):.2f} | {spread} | {len(runs)} |\n")
    print("| one GPU | images/s | GFLOP/s |\n| --- | --- | --- |")
    for model, steps in (("cifar10_quick", 5000), ("cifar10_tutorial", 3000), ("resnet20", 2000)):
        rate = _by_hand(make_job(data, model, steps, executors=1, device="gpu")).images_per_second
        print(
            f"| {model}, batch {RECIPES[model].global_batch} | {rate:,.0f} | {achieved_gflops(model, rate):,.0f} |",
            flush=True,
        )
    print(flush=True)


@functools.cache
def _short_dataset() -> Dataset:
    """Return the data set with its whole training set and SHORT_TEST test images, in a folder that goes at the end."""
    whole = dataset().open()
    folder = Path(tempfile.mkdtemp(prefix="sparkgauge-measure-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tests = whole.test_images[:SHORT_TEST], whole.test_labels[:SHORT_TEST]
    content = Content(whole.train_images, whole.train_labels, *tests)
    write_prepared(content, folder / "data", kind="real", source="CIFAR-10 with fewer test images")
    return Dataset.load(folder / "data")


def _step_cpu_seconds(one: Round) -> float:
    """Return the CPU seconds of all executors' steps after the first."""
    spent = [executor.phase_cpu_seconds for executor in one.executors]
    return sum(phases.feed + phases.compute + phases.sync for phases in spent if phases is not None)


def _cluster() -> AbstractContextManager[SparkCluster]:
    torch_launch.prepare()
    return measuring.cluster(PREIMPORTS["torch"])


def _on_spark(cluster: SparkCluster, job: Job, start: Any = torch_launch.launch) -> Round:
    return run_round(cluster.spark.sparkContext, job, start, timeout_seconds=TIMEOUT_SECONDS)


def _by_hand(job: Job) -> Round:
    return run_by_hand(job, timeout_seconds=TIMEOUT_SECONDS)


def _in_a_process(function: Callable[[Job], float], job: Job) -> float:
    """Return what ``function`` returns in a fresh process with the job's number of threads."""
    with thread_limits(job.threads), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (job,))


def _bare_loop(job: Job) -> float:
    """Return the images/s of the same network and batches in a loop that knows nothing of this package's trainer.

    Channels last, the images in memory as floats, distorted by PyTorch, torch.optim.SGD with its fused kernel, memory
    kept by the allocator: what one would write for this processor by hand.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    from sparkgauge.adapters.collective import Exchange, Team
    from sparkgauge.adapters.memory import keep_freed_memory
    from sparkgauge.adapters.torch import networks
    from sparkgauge.data.shards import Shard

    torch.set_num_threads(job.threads)
    keep_freed_memory()
    recipe, batch = RECIPES[job.model], job.global_batch
    shard = Shard.open(job.dataset_folder, executors=1, rank=0, global_batch=batch, seed=1)
    images = torch.from_numpy(shard.images[:8000].copy()).permute(0, 3, 1, 2).float()  # channels last already
    labels = torch.from_numpy(shard.labels[:8000].astype("int64"))
    network: nn.Module = networks.build(recipe, 1, Exchange(Team()))
    shared: dict[str, Any] = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "fused": True}
    optimiser = torch.optim.SGD(network.parameters(), lr=recipe.learning_rates[0][1], **shared)
    augment = _tutorial_batch if recipe.augment else _shifted_batch
    seconds = []
    for step in range(job.iterations or 0):
        began = time.perf_counter()
        chosen = torch.randint(0, len(images), (batch,))
        loss = functional.cross_entropy(network(augment(images[chosen])), labels[chosen])
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
        if step:
            seconds.append(time.perf_counter() - began)
    return batch * len(seconds) / sum(seconds)


def _shifted_batch(images: Any) -> Any:
    """Return images shifted by up to 4 pixels, mirrored half of the time, and scaled."""
    import torch
    from torch.nn import functional

    framed = functional.pad(images, (4, 4, 4, 4), value=120.0)
    corners = torch.randint(0, 9, (len(images), 2)).tolist()
    out = torch.empty_like(images)
    for one, (top, left) in enumerate(corners):
        out[one] = framed[one, :, top : top + 32, left : left + 32]
    flips = torch.rand(len(out)) < 0.5
    out[flips] = out[flips].flip(3)
    return (out - 120.0) / 64.0


def _tutorial_batch(images: Any) -> Any:
    """Return the distortions of TensorFlow's tutorial."""
    import torch

    corners = torch.randint(0, 9, (len(images), 2)).tolist()
    out = images.new_empty((len(images), 3, 24, 24)).contiguous(memory_format=torch.channels_last)
    for one, (top, left) in enumerate(corners):
        out[one] = images[one, :, top : top + 24, left : left + 24]
    flips = torch.rand(len(out)) < 0.5
    out[flips] = out[flips].flip(3)
    out += torch.rand(len(out), 1, 1, 1) * 126 - 63
    mean = out.mean((2, 3), keepdim=True)
    out = (out - mean) * (torch.rand(len(out), 1, 1, 1) * 1.6 + 0.2) + mean
    deviation, mean = torch.std_mean(out, (1, 2, 3), keepdim=True)
    return (out - mean) / deviation.clamp_min(1 / 41.6)


if __name__ == "__main__":
    main()
