"""Times a Bayesian step beside a plain one and stores what it finds: python benchmarks/bench.py [--out FILE]

Contenders take turns, a few steps at a time, and the median over the turns counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vardrop as vd
from contenders import Contender, LastStep, Step, layer_step, own, peers, training_step
from vardrop.memory import keep_freed_memory
from vardrop.zoo import build_net

HERE = Path(__file__).parent
DENSE = {"Linear 784-300, batch 100": (784, 300, 100), "Linear 1024-1024, batch 512": (1024, 1024, 512)}
LARGE = {"Linear 4096-4096, batch 512": (4096, 4096, 512)}
NETS = {
    "LeNet-5-Caffe step, batch 100, Adam": ("lenet-5", (1, 28, 28)),
    "VGG-like step, batch 100, Adam": ("vgg-like", (3, 32, 32)),
}
UNITS = (256, 512, 1024, 2048, 4096, 8192)
GATED = "LeNet-5-Caffe step with gates, batch 100, Adam"
LSTM = "LSTM 1000-1000 step, sequence 100, batch 64, Adam"
BATCHES = (1, 8, 64, 512, 2048)
PACKAGES = ("torch", "cplxmodule", "bayesian-torch", "torchbnn", "blitz-bayesian-pytorch", "pytorch-ard")


def seconds(steps: dict[str, Step], *, turns: int = 9, budget: float = 0.15) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of each step over `turns` turns of about `budget` seconds each."""
    repeats, found = {}, {name: [] for name in steps}
    first = {}
    for name, step in steps.items():
        started = perf_counter()
        step()
        first[name] = perf_counter() - started
        step()
        started = perf_counter()
        step()
        repeats[name] = max(1, int(budget / (perf_counter() - started)))
    for _ in range(turns):
        for name, step in steps.items():
            step()
            started = perf_counter()
            for _ in range(repeats[name]):
                step()
            found[name].append((perf_counter() - started) / repeats[name])
    return {name: {**_spread(values), "first": first[name]} for name, values in found.items()}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def dense(inputs: int, outputs: int, batch: int, contenders: list[Contender]) -> dict[str, Step]:
    x = torch.randn(batch, inputs)
    return {each.name: layer_step(each, each.dense(inputs, outputs), x) for each in contenders}


def convolution(contenders: list[Contender]) -> dict[str, Step]:
    x = torch.randn(64, 64, 32, 32)
    return {each.name: layer_step(each, each.conv(64, 64), x) for each in contenders if each.conv}


def nets(name: str, shape: tuple[int, ...]) -> dict[str, Step]:
    """A training step: as a newcomer writes it, and with everything that plain PyTorch can do for itself."""
    x, y = torch.randn(100, *shape), torch.randint(10, (100,))

    def build(last: bool = False) -> nn.Module:
        net = build_net(name, input_shape=shape, num_classes=10)
        return net.to(memory_format=torch.channels_last) if last else net

    def noisy(method: vd.Method, *, quick: bool) -> nn.Module:
        net = vd.convert(build(quick), method)
        return vd.fast(net) if quick else net

    return {
        "plain": training_step(build(), x, y, fused=False),
        "plain, channels last, fused Adam": training_step(build(True), x, y, fused=True),
        "vardrop SparseVD, reference": training_step(noisy(vd.SparseVD(), quick=False), x, y, fused=False),
        "vardrop SparseVD, fast": training_step(noisy(vd.SparseVD(), quick=True), x, y, fused=True),
        "vardrop ARD, fast": training_step(noisy(vd.ARD(), quick=True), x, y, fused=True),
    }


def gated() -> dict[str, Step]:
    """Training steps with noise on units; ours as the command line trains: channels last, fused Adam."""
    x, y = torch.randn(100, 1, 28, 28), torch.randint(10, (100,))

    def build(last: bool) -> nn.Module:
        net = build_net("lenet-5", input_shape=(1, 28, 28), num_classes=10)
        return net.to(memory_format=torch.channels_last) if last else net

    steps = {
        "plain": training_step(build(False), x, y, fused=False),
        "plain, channels last, fused Adam": training_step(build(True), x, y, fused=True),
    }
    for method in (vd.BetaBernoulli(), vd.StructuredBP(), vd.StructuredVBD(), vd.ConcreteDropout()):
        steps[f"vardrop {type(method).__name__}"] = training_step(vd.convert(build(True), method), x, y, fused=True)
    quick = vd.fast(vd.convert(build(True), vd.StructuredBP()))
    return {**steps, "vardrop StructuredBP, fast": training_step(quick, x, y, fused=True)}


def lstm(units: int = 1000, length: int = 100, batch: int = 64) -> dict[str, Step]:
    """Training steps of a recurrent net; its noise is one draw of the weights, on which the fast path does not bear."""
    x, y = torch.randn(batch, length, units), torch.randint(10, (batch,))

    def build() -> nn.Module:
        return nn.Sequential(nn.LSTM(units, units, batch_first=True), LastStep(), nn.Linear(units, 10))

    return {
        "plain": training_step(build(), x, y, fused=True),
        "vardrop SparseVD": training_step(vd.convert(build(), vd.SparseVD()), x, y, fused=True),
    }


def memory(units: int = 4096, batch: int = 512) -> dict[str, Any]:
    """Peak bytes of the tensors of a step, parameters and gradients included, the input not."""
    found = {}
    for each in own():
        if each.name in ("plain", "vardrop SparseVD, reference", "vardrop SparseVD, fast"):
            layer = each.dense(units, units)
            step = layer_step(each, layer, torch.randn(batch, units))
            step()
            layer.zero_grad(set_to_none=True)
            found[each.name] = _peak_bytes(step) + sum(p.numel() * p.element_size() for p in layer.parameters())
            del layer, step
    return {"weight_bytes": 4 * units * units, "peak_bytes": found}


def _peak_bytes(step: Step) -> int:
    """Most bytes of tensors at one time above those before the step, by torch's own record of its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes))


def operations(step: Step, *, count: int = 20) -> list[dict[str, Any]]:
    """Where the time of a step goes: milliseconds of each kind of operation, those below 1 % summed up."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(count):
            step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    large = [row for row in rows if row.self_cpu_time_total >= 0.01 * total]
    named = [
        {"name": row.key, "milliseconds": row.self_cpu_time_total / 1e3 / count, "calls": row.count / count}
        for row in large
    ]
    rest = (total - sum(row.self_cpu_time_total for row in large)) / 1e3 / count
    return [*named, {"name": "everything else", "milliseconds": rest, "calls": 0}]


def machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "bfloat16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--only", help="a step by its name: measure this one anew, and keep the rest of the file")
    out, only = (options := parser.parse_args()).out, options.only
    keep_freed_memory()
    torch.manual_seed(0)
    everyone, ours = [*own(), *peers()], own()
    parts: dict[str, Callable[[], Any]] = {
        **{name: lambda sizes=sizes: seconds(dense(*sizes, everyone)) for name, sizes in DENSE.items()},
        **{name: lambda sizes=sizes: seconds(dense(*sizes, everyone), turns=5) for name, sizes in LARGE.items()},
        "Conv2d 64-64 3x3 on 32x32, batch 64": lambda: seconds(convolution(everyone), turns=5),
        **{name: lambda net=net: seconds(nets(*net), turns=5) for name, net in NETS.items()},
        GATED: lambda: seconds(gated(), turns=7),
        LSTM: lambda: seconds(lstm(), turns=3),
    }
    if only is not None:
        if only not in parts:
            parser.error(f"--only {only!r}: must be one of {', '.join(map(repr, parts))}")
        found = json.loads(out.read_text())
        found["steps"][only] = parts[only]()
        show(only, found["steps"][only])
        out.write_text(json.dumps(found, indent=1))
        return
    found: dict[str, Any] = {"machine": machine(), "steps": {}, "growth": {"units": {}, "batch": {}}}
    for name, part in parts.items():
        found["steps"][name] = part()
        show(name, found["steps"][name])
    pair = [each for each in ours if each.name in ("plain", "vardrop SparseVD, fast")]
    for units in UNITS:
        found["growth"]["units"][units] = seconds(dense(units, units, 256, pair), turns=3)
        show(f"{units} units, batch 256", found["growth"]["units"][units])
    for batch in BATCHES:
        found["growth"]["batch"][batch] = seconds(dense(1024, 1024, batch, pair), turns=5)
        show(f"1024 units, batch {batch}", found["growth"]["batch"][batch])
    found["memory"] = memory()
    found["operations"] = {
        "Linear 1024-1024, batch 512": operations(dense(1024, 1024, 512, ours)["vardrop SparseVD, fast"]),
        "LeNet-5-Caffe step, batch 100, Adam": operations(nets("lenet-5", (1, 28, 28))["vardrop SparseVD, fast"]),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(f"stored in {out}; python benchmarks/render.py makes docs/performance.md of it")


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    plain = found["plain"]["median"]
    print(f"{name}: plain {1e3 * plain:.2f} ms", flush=True)
    for contender, row in found.items():
        print(f"    {contender:<40} {row['median'] / plain:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
