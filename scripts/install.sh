#!/usr/bin/env bash
# Install ossature, its tests' tools and the right torch into a virtual environment.
#
#   scripts/install.sh VENV        called by `make`; plain pip is all it needs
#
# The stock torch of Linux brings several GB of CUDA.  Without an NVIDIA GPU the CPU build of the
# same version is taken: from wherever pip looks already, else from PyTorch's own CPU index.
#
#   TORCH=torch==2.12.0 make test      another torch, taken as it is
#   PYTHON=python3.13 make test        another Python
set -euo pipefail

venv=${1:?usage: scripts/install.sh VENV}
version=2.13.0
cd "$(dirname "$0")/.."

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; say which one with PYTHON=..." >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ -n "${TORCH:-}" ]; then
    pip install --quiet "$TORCH"
elif [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
    pip install --quiet "torch==$version"
elif ! pip install --quiet "torch==$version+cpu" 2>/dev/null; then
    pip install --quiet --retries 1 "torch==$version+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu || {
        echo "error: no CPU build of torch $version found; say which torch with TORCH=..." >&2
        exit 2
    }
fi
pip install --quiet --constraint constraints.txt --editable '.[dev]'
