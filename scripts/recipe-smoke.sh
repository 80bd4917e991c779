#!/usr/bin/env bash
# Runs every stage of the miniature pack's recipe for a few seconds, with the packages that it pins, in
# a virtual environment under target/. Nothing of the shipped pack is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=target/recipe-venv
[[ -x $venv/bin/pip ]] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r models/mini/recipe/requirements.txt
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
"$venv/bin/python" models/mini/recipe/recipe.py --smoke --run "$run"
weights=$run/smoke/pack/transformer/diffusion_pytorch_model.safetensors
test -s "$weights"
gunzip -c "$weights.gz" | cmp - "$weights"
