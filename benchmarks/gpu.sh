#!/usr/bin/env bash
# Measures jaxft on one GPU in under nine minutes; see benchmarks/gpu.py.
#
#   OUT           folder of the lines; benchmarks/results
#   TORCH_PYTHON  Python with torch and transformers, to measure PyTorch as well; none
#   PYTHON        Python 3.12 or newer; python3
#   WHEELS        folder of wheels, for a machine without a network
#   TINY=1        tiny shapes, on any device
#
# Installs jaxft with CUDA where that Python has not what it needs. Further arguments are gpu.py's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \
        "$WHEELS"/*.whl
    export PYTHONPATH="$site:$PYTHONPATH"
fi
if ! "$python" -c 'import benchmarks.workload, jaxft.programs.generate'; then
    "$python" -m pip install --quiet --editable '.[cuda]'
fi
"$python" benchmarks/gpu.py --output "${OUT:-benchmarks/results}" \
    --torch-python "${TORCH_PYTHON:-}" ${TINY:+--tiny} "$@"
