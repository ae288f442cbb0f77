"""Kernels on eight devices, and in two processes, against the same on one."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
PARTS = [
    pytest.param("manual", "images"),
    *(
        pytest.param(mesh, case, marks=pytest.mark.slow)
        for mesh, case in [
            ("automatic", "images"),
            ("automatic", "mlp"),
            ("automatic", "tokens"),
            ("explicit", "tokens"),
            ("explicit", "mlp"),
            ("explicit", "images"),
            ("manual", "mlp"),
            ("manual", "tokens"),
        ]
    ),
]


def start(program, *arguments, devices):
    """A Python process with this one's import path."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *(p for p in sys.path if p)]),
    }
    command = [sys.executable, str(HERE / program), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output_of(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()[-1]


@functools.cache
def figures(mesh, case):
    return json.loads(output_of(start("_devices.py", mesh, case, devices=8)))


@pytest.mark.parametrize(("mesh", "case"), PARTS)
def test_every_figure_is_that_of_one_device(mesh, case):
    wrong = {name: f["gap"] for name, f in figures(mesh, case).items() if not f["gap"] < 2e-6}
    assert not wrong


@pytest.mark.parametrize(("mesh", "case"), [p for p in PARTS if p.values[0] == "explicit"])
def test_results_shaped_like_parameters_live_where_the_parameters_do(mesh, case):
    found = figures(mesh, case)
    for check in ("sum", "clipped sum", "weighted_grad", "hvp"):
        assert all("'fsdp'" in spec for spec in found[f"fsdp: {check}"]["specs"]), check
        assert not any("'" in spec for spec in found[f"replicated: {check}"]["specs"]), check


def test_two_processes_agree_with_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start("_processes.py", coordinator, str(index), devices=2) for index in range(2)]
    for process in processes:
        word, gap = output_of(process).split()
        assert word == "gap"
        assert float(gap) < 1e-6
