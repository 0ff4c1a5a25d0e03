"""Policies where training is more than one process and one float: DataParallel, and quantisation-aware training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize
from paddle import nn
from paddle.quantization import QAT, QuantConfig
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

import flatwater.paddle as fw

# With the star, as quantisation may put a layer of its own around a norm.
RULES = [
    {"match": "0.1*", "norm": "group_norm", "groups": 2},
    {"match": "1.1*", "freeze": "both"},
    {"match": "2.1*", "momentum": 0.5, "learning_rate_factor": 0.0},
]


def network() -> Any:
    paddle.seed(5)
    blocks = [nn.Sequential(nn.Conv2D(size, 4, 3, padding=1), fw.BatchNorm2D(4, act="relu")) for size in (3, 4, 4)]
    return randomize(nn.Sequential(*blocks))


def step(model: nn.Layer, optimizer: Any, x: paddle.Tensor) -> None:
    model.train()
    y = model(x)
    (y * y).mean().backward()
    optimizer.step()
    optimizer.clear_grad()


def check_policy(norms: Any, before: list[dict[str, np.ndarray]]) -> None:
    """That RULES held over training steps: γ, β and statistics of three norms before, and now."""
    first, second, third = ({name: value.numpy() for name, value in norm.state_dict().items()} for norm in norms)
    assert type(norms[0]) is fw.GroupNorm
    assert not np.array_equal(first["weight"], before[0]["weight"])
    assert all(np.array_equal(second[name], value) for name, value in before[1].items())
    assert np.array_equal(third["weight"], before[2]["weight"])
    assert not np.array_equal(third["_mean"], before[2]["_mean"])
    assert norms[2]._momentum == 0.5


def states(norms: Any) -> list[dict[str, np.ndarray]]:
    return [{name: value.numpy().copy() for name, value in norm.state_dict().items()} for norm in norms]


WORKER = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, paddle, paddle.distributed as dist
import flatwater.paddle as fw
from test_policy_in_training import RULES, check_policy, network, states, step

dist.init_parallel_env()
rank = dist.get_rank()
model = network()
applied = fw.apply_policy(model, RULES)
norms = [block[1] for block in model]
parallel = paddle.DataParallel(model)
optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters(), weight_decay=0.01)
applied.prepare(optimizer)
before = states(norms)
for index in range(3):
    images = np.random.default_rng(10 * rank + index).normal(size=(4, 3, 6, 6)).astype("float32")
    step(parallel, optimizer, paddle.to_tensor(images))
check_policy(norms, before)
assert fw.frozen_report(model).ok
for norm in norms:
    gathered = []
    dist.all_gather(gathered, norm.weight)
    assert np.array_equal(gathered[0].numpy(), gathered[1].numpy()), "the processes have different weights"
print("rank", rank, "fine")
"""


def test_a_policy_holds_under_data_parallel(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent)), encoding="utf-8")
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(script)]
    environment = os.environ | {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    logs = "\n".join(path.read_text(errors="replace") for path in (tmp_path / "log").glob("workerlog.*"))
    assert result.returncode == 0, logs[-3000:] + result.stderr[-1000:]
    assert "rank 0 fine" in logs + result.stdout


@pytest.mark.parametrize("order", ["policy first", "quantised first"])
@pytest.mark.parametrize("quantised", ["convolutions", "everything"])
def test_a_policy_holds_under_quantisation_aware_training(quantised: str, order: str, tmp_path: Path) -> None:
    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    everything = quanter if quantised == "everything" else None
    config = QuantConfig(activation=everything, weight=everything)
    config.add_type_config(nn.Conv2D, activation=quanter, weight=quanter)
    qat = QAT(config)
    model = network()
    if order == "policy first":
        applied = fw.apply_policy(model, RULES)
        model = qat.quantize(model, inplace=True)
    else:
        model = qat.quantize(model, inplace=True)
        applied = fw.apply_policy(model, RULES)
    norms = [getattr(block[1], "_observed", block[1]) for block in model]
    assert "Quanted" in type(model[0][0]).__name__
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    applied.prepare(optimizer)
    before = states(norms)
    for index in range(3):
        step(
            model, optimizer, paddle.to_tensor(np.random.default_rng(index).normal(size=(4, 3, 6, 6)).astype("float32"))
        )
    check_policy(norms, before)
    assert fw.frozen_report(model).ok
    # QAT.convert() fails in Paddle 3.3.1; what training saves is the model as it is, fake quantisation and all.
    x = example(2, 3, 6, 6)
    model.eval()
    paddle.jit.save(model, str(tmp_path / "model"), [paddle.static.InputSpec([None, 3, 6, 6], "float32")])
    loaded = paddle.jit.load(str(tmp_path / "model"))
    loaded.eval()
    np.testing.assert_allclose(loaded(x).numpy(), evaluate(model, x), rtol=1e-5, atol=1e-6)  # float32, same operators
