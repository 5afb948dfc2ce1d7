"""How large a model can be profiled here, in how much time and memory? Llama-7B by default.

    python benchmarks/how_large_a_model/run.py [--name model|small|transformers] [--dtype float32|bfloat16]
                                               [--budget 300] [--batch 4] [--json] [--quick]

Runs `plan profile` as a user does and watches its memory. Exits with 7 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MINUTES, BEYOND = 15.0, 2 * 2**30
"""Targets: minutes for the whole command, and bytes above what the largest layer needs."""


def main() -> int:
    """Profile one model; return 7 when it took too long or too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="model", help="A function of llama.py: model (7B), small, transformers (7B).")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="The small one, one layer at a time.")
    asked = parser.parse_args()
    if asked.quick:
        asked.name, asked.budget = "small", 10.0
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LLAMA_DTYPE": asked.dtype,
        "LLAMA_BATCH": str(asked.batch),
    }
    file = str(HERE / "llama.py") + ("" if asked.name == "model" else f":{asked.name}")
    command = [sys.executable, "-m", "planner.cli.main", "profile", file, "--device", "cpu", "--json"]
    command += ["--budget", str(asked.budget), *(["--one-by-one"] if asked.quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.2)
        took = time.monotonic() - begun
        out = process.stdout.read() if process.stdout else ""
        if process.returncode != 0:
            print(out)
            return process.returncode
        found = json.loads(out)["data"]
        profile = json.loads(next((Path(folder) / ".plan" / "profiles").glob("*.json")).read_text())
    layers = profile["layers"]
    needs = max(map(_needs, layers))
    kinds = {layer.get("like") or layer["name"] for layer in layers}
    figures = {
        "parameters": sum(layer["parameter_bytes"] for layer in layers) / (2 if asked.dtype == "bfloat16" else 4),
        "layers": len(layers),
        "kinds": len(kinds),
        "samples": [t["samples"] for t in layers[0]["times"][0]["forward"]],
        "rounds": found["measuring"]["rounds"],
        "one_by_one": found["measuring"]["one_by_one"],
        "minutes": took / 60,
        "peak_bytes": peak,
        "largest_layer_bytes": needs,
        "beyond_bytes": peak - needs,
    }
    met = figures["minutes"] <= MINUTES and (asked.quick or figures["beyond_bytes"] <= BEYOND)
    if asked.json:
        print(json.dumps({**figures, "met": met}))
    else:
        print(f"{asked.name}, {asked.dtype}: {figures['parameters'] / 1e9:.3g}B parameters, {len(layers)} layers of")
        print(f"{len(kinds)} kinds, at {figures['samples']} samples, {figures['rounds']} rounds")
        print(f"time    {figures['minutes']:.1f} minutes   (target: {MINUTES:g})")
        print(f"memory  {peak / 2**30:.2f} GiB at the peak, the largest layer needs {needs / 2**30:.2f} GiB")
        print(f"        {figures['beyond_bytes'] / 2**30:.2f} GiB beyond it   (target: {BEYOND / 2**30:g})")
        print("met" if met else "missed")
    return 0 if met else 7


def _needs(layer: dict[str, object]) -> int:
    """What a layer has in memory at its worst: all that training holds of it, and the transient part of a pass."""
    static = sum(int(layer[f"{of}_bytes"]) for of in ("parameter", "buffer", "gradient", "optimizer"))  # type: ignore[call-overload]
    sizes = layer["sizes"][-1]  # type: ignore[index]
    passing = sizes["saved_bytes"] + sizes["output_bytes"] + sizes["backward_peak_bytes"]
    return static + max(int(layer["optimizer_peak_bytes"]), passing)  # type: ignore[call-overload]


def _peak(pid: int) -> int:
    """The largest resident memory that a process has had so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    sys.exit(main())
