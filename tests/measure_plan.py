"""How long the first plan of a 10 B model takes, and how much memory: ``python -m tests.measure_plan``.

A fresh process for each workload; the clock starts when transformers and the model's class are imported.
"""

from __future__ import annotations

import subprocess
import sys

WORKLOADS = {
    "8,192 tokens, fits": {"budget": "24GiB", "context": 8192},
    "8,192 tokens and a screenshot, fits": {"budget": "24GiB", "context": 8192, "images": 1},
    "8,192 tokens and a screenshot, fits with changes": {"budget": "12GiB", "context": 8192, "images": 1},
    "8,192 tokens and a screenshot, fits with changes, less": {"budget": "8GiB", "context": 8192, "images": 1},
}
_PLAN = """
import resource, time
import autoglm_lab as lab
import autoglm_lab.memory.planning.planner
from transformers import Glm4vForConditionalGeneration

began = time.monotonic()
plan = lab.plan("autoglm-phone-9b", device="RTX 4090", **{workload})
took = time.monotonic() - began
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{{took:.1f}} s, {{most:.0f}} MiB at most: {{plan.verdict}}, {{len(plan.alternatives)}} alternatives")
"""


def main() -> None:
    for name, workload in WORKLOADS.items():
        code = _PLAN.format(workload=workload)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        sys.stdout.write(f"{name}: {told}")


if __name__ == "__main__":
    main()
