"""A run's folder as the job leaves it, with made-up numbers of the right shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LEVELS = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]


def write_run(folder: Path, *, layers: int = 3) -> Path:
    """Write every file that the report reads."""
    generator = np.random.default_rng(0)
    (folder / "samples").mkdir(parents=True)
    save(folder / "metrics.json", metrics())
    save(folder / "history.json", history(generator))
    save(folder / "norms.json", norms(generator, layers))
    save(folder / "fold.json", fold(layers))
    save(folder / "verification.json", verification())
    (folder / "config.yaml").write_text("seed: 7\nmodel:\n  width: 64  # <script>\n", encoding="utf-8")
    save(folder / "samples" / "samples.json", samples())
    for sample in samples():
        pixels = generator.integers(150, 255, (32, 160), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / sample["file"])
    return folder


def save(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def metrics() -> dict[str, Any]:
    return {
        "char_accuracy": 0.98127,
        "char_accuracy_unseen_font": 0.9343,
        "line_accuracy": 0.921,
        "line_accuracy_unseen_font": 0.784,
        "test_lines": 2000,
        "distinct_characters": 1204,
        "seconds": {"corpus": 6.1, "render": 38.4, "train": 421.7, "evaluate": 17.9, "export": 8.8, "verify": 5.2},
        "environment": {"paddlepaddle": "3.3.1", "processor": "AMD EPYC", "threads": 2, "kernels": "avx2"},
    }


def history(generator: np.random.Generator) -> dict[str, Any]:
    steps = range(10, 1510, 10)
    loss = [25 * np.exp(-step / 140) + 0.08 + 0.4 * np.exp(-step / 500) for step in steps]
    return {
        "train": [
            {
                "step": step,
                "loss": value * generator.lognormal(0, 0.18),
                "lr": 1e-3 * min(step / 100, 0.5 + 0.5 * np.cos(np.pi * step / 1500)),
                "lines_per_second": generator.normal(182, 4),
            }
            for step, value in zip(steps, loss, strict=True)
        ],
        "evaluations": [
            {
                "step": step,
                "char_accuracy": 0.982 - 0.98 * np.exp(-step / 210),
                "char_accuracy_unseen_font": 0.935 - 0.93 * np.exp(-step / 240),
            }
            for step in range(100, 1600, 100)
        ],
    }


def norms(generator: np.random.Generator, layers: int) -> dict[str, Any]:
    return {
        "format": "flatwater-norms",
        "version": 1,
        "quantile_levels": LEVELS,
        "layers": [
            {
                "path": f"backbone.stage{index // 4}.{index % 4}.bn",
                "kind": "batch",
                "channels": 64,
                "samples": [norm_sample(generator, index, step) for step in range(0, 1501, 75)],
            }
            for index in range(layers)
        ],
        "unobserved": {},
    }


def norm_sample(generator: np.random.Generator, index: int, step: int) -> dict[str, Any]:
    grown = 1 - np.exp(-step / 300)
    scale = (0.4 + 0.5 * index) * (1 + 2.5 * grown)
    before = generator.normal(-0.6 * grown * scale, scale * generator.lognormal(0, 0.4, 4000))
    after = generator.normal(-0.3 * grown, 1 - 0.2 * grown, 4000)
    mean = generator.permutation(np.linspace(-1, 1, 64)) * 2 * grown * scale
    variance = 1 + grown * (scale**2 * np.exp(np.linspace(-2, 2, 64)) - 1)
    return {
        "step": step,
        "statistics": "batch",
        "before": distribution(before),
        "after": distribution(after),
        "running_mean": np.quantile(mean, (0, 0.25, 0.5, 0.75, 1)).tolist(),
        "running_variance": np.quantile(variance, (0, 0.25, 0.5, 0.75, 1)).tolist(),
    }


def distribution(values: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(values, (0.001, 0.999))
    return {
        "count": values.size,
        "non_finite": 0,
        "mean": values.mean(),
        "std": values.std(),
        "quantiles": np.quantile(values, LEVELS).tolist(),
        "low": low,
        "high": high,
        "counts": np.histogram(values, bins=48, range=(low, high))[0].tolist(),
    }


def fold(layers: int) -> dict[str, Any]:
    pairs = [
        {"conv": f"backbone.stage{index // 4}.{index % 4}.conv", "norm": f"backbone.{index}"} for index in range(layers)
    ]
    return {
        "folded": pairs,
        "left": [{"norm": "neck.norm", "reason": "its input is also read by neck.add, so folding would change both"}],
        "max_abs": 3.1e-6,
        "max_rel": 8.2e-7,
    }


def verification() -> dict[str, Any]:
    forms = (
        "reloaded Paddle program",
        "Paddle Inference, IR passes on",
        "Paddle Inference, IR passes off",
        "ONNX Runtime",
    )
    rows = [
        {
            "form": form,
            "batch": batch,
            "max_abs": 4.3e-6,
            "max_rel": 9e-7,
            "tolerance": 1e-4,
            "passed": True,
            "note": "",
        }
        for form in forms
        for batch in (1, 2, 17)
    ]
    return {"passed": True, "rows": rows}


def samples() -> list[dict[str, Any]]:
    return [
        {"file": "0.png", "truth": "平水行舟", "read": "平水行舟", "confidence": 0.998, "font": "NotoSansSC"},
        {
            "file": "1.png",
            "truth": "批量归一化",
            "read": "批里归一",
            "confidence": 0.71,
            "font": "wqy-microhei (unseen)",
        },
        {"file": "2.png", "truth": "人工智能", "read": "人人工智能", "confidence": 0.83, "font": "NotoSerifSC"},
    ]
