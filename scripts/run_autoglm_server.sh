#!/usr/bin/env bash
# Serve AutoGLM on this machine's GPUs, as the article's start script does: http://HOST:8000/v1
#
#   AUTOGLM_LAB_API_KEY=… AUTOGLM_LAB_ADMIN_KEY=… scripts/run_autoglm_server.sh [MODEL] [options of autoglm-lab serve]
#
# MODEL    a preset, a folder or a hub id in the local cache. Default: zai-org/AutoGLM-Phone-9B; without a GPU: autoglm-tiny.
# HOST     where to listen. Default: 0.0.0.0 where there is an API key, else 127.0.0.1.
# PORT     default 8000.
# DEVICES  "0", "0,1" or "cpu". Several share every layer of the model (tensor parallel). Default: the GPU with the most
#          free memory; the two with the most where none has 40 GiB free.
# EACH     1: a whole model and a service on each of several devices instead, on PORT and the ports after it.
# POLICY   a file of settings, or auto. Default: auto on a GPU, which fits the model into what is free.
set -euo pipefail

serve=(${AUTOGLM_LAB:-autoglm-lab} serve)
port=${PORT:-8000}
host=${HOST:-$([[ -n ${AUTOGLM_LAB_API_KEY:-} ]] && echo 0.0.0.0 || echo 127.0.0.1)}

freest_gpus() {
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=index,memory.free --format=csv,noheader,nounits 2>/dev/null | sort -t, -k2 -nr |
    awk -F', *' 'NR == 1 { found = $1; enough = $2 >= 40960 } NR == 2 && !enough { found = found "," $1 } END { if (NR) print found }' || true
}

devices=${DEVICES:-$(freest_gpus)}
if [[ -z $devices || $devices == cpu ]]; then
  default=autoglm-tiny policy=${POLICY:-}
  devices=cpu
else
  default=zai-org/AutoGLM-Phone-9B policy=${POLICY-auto}
  # Counts only when it is set before CUDA starts.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

model=$default
if [[ $# -gt 0 && $1 != -* ]]; then
  model=$1
  shift
fi
options=(--host "$host")
[[ -n $policy ]] && options+=(--policy "$policy")

if [[ $devices != *,* ]]; then
  if [[ $devices == cpu ]]; then
    exec "${serve[@]}" "$model" "${options[@]}" --device cpu --port "$port" "$@"
  fi
  CUDA_VISIBLE_DEVICES=$devices exec "${serve[@]}" "$model" "${options[@]}" --device cuda:0 --port "$port" "$@"
fi

if [[ ${EACH:-0} != 1 ]]; then
  shared=$(awk -F, '{ print NF }' <<<"$devices")
  CUDA_VISIBLE_DEVICES=$devices exec "${serve[@]}" "$model" "${options[@]}" --device cuda:0 --tensor-parallel "$shared" --port "$port" "$@"
fi

# One service a device; the first that ends takes the others with it.
pids=()
stop() { kill "${pids[@]}" 2>/dev/null || true; }
trap stop INT TERM
for device in ${devices//,/ }; do
  CUDA_VISIBLE_DEVICES=$device "${serve[@]}" "$model" "${options[@]}" --device cuda:0 --port "$port" "$@" &
  pids+=($!)
  port=$((port + 1))
done
status=0
wait -n || status=$?
stop
wait || true
exit "$status"
