#!/usr/bin/env bash
# Set up, check every stage on this machine's GPU, compare with what is claimed: bash reproduce/gpu.sh [NAME]
# NAME goes into the names of the files; without one it is the GPU's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ]; then
  name=$1
else
  command -v nvidia-smi > /dev/null || { echo "no nvidia-smi here: is this a machine with an NVIDIA GPU?" >&2; exit 2; }
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
fi
name=$(printf '%s' "$name" | tr -cs '[:alnum:]\n' '-' | tr '[:upper:]' '[:lower:]')
make setup
rm -f "reproduce/gpu-$name.json"
# A part that fails does not stop the comparison.
.venv/bin/rime gpu-check --json "reproduce/gpu-$name.json" > "reproduce/gpu-$name.md" || echo "a part failed" >&2
if [ ! -e "reproduce/gpu-$name.json" ]; then
  cat "reproduce/gpu-$name.md" >&2
  exit 2
fi
cat "reproduce/gpu-$name.md"
echo
.venv/bin/python reproduce/compare.py "reproduce/gpu-$name.json"
