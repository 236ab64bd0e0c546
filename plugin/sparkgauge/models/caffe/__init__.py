"""The suite's nets and solvers for Caffe, as prototxt files beside this module."""

from __future__ import annotations

from pathlib import Path

SOLVERS = {
    "cifar10_quick": "cifar10_quick_solver.prototxt",
    "cifar10_full": "cifar10_full_solver.prototxt",
    "cifar10_full_sigmoid": "cifar10_full_sigmoid_solver.prototxt",
    "cifar10_full_sigmoid_bn": "cifar10_full_sigmoid_bn_solver.prototxt",
    "lenet": "lenet_solver.prototxt",
    "lenet_adadelta": "lenet_adadelta_solver.prototxt",
    "lenet_adam": "lenet_solver_adam.prototxt",
    "lenet_multistep": "lenet_multistep_solver.prototxt",
    "lenet_rmsprop": "lenet_solver_rmsprop.prototxt",
}
"""The solver of each model, by its name; those of lenet need the LMDBs of MNIST near the test."""


def path(model: str) -> Path:
    """Return the solver file of a built-in model; KeyError for another name."""
    return Path(__file__).with_name(SOLVERS[model])
