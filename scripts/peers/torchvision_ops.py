"""Let torchvision be imported where its compiled part does not load: models only want its resizing, written in torch.

Run with the interpreter whose torchvision it is. Where the compiled part loads nothing is changed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

_DECLARED = """\
import torch as _torch

if not hasattr(_torch.ops.torchvision, "nms"):
    _library = _torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Declare the operators that its import registers shapes for."""
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        sys.exit(f"torchvision is not installed in {sys.prefix}")
    file = Path(spec.origin).with_name("_meta_registrations.py")
    file.write_text(_DECLARED + file.read_text())
    subprocess.run([sys.executable, "-c", "import torchvision.transforms.v2"], check=True)


if __name__ == "__main__":
    main()
