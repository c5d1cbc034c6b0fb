#!/bin/sh
# Install PyTorch into the environment of the Python given as first argument; `make help` describes the variables.
# On Linux the default wheel brings gigabytes of CUDA packages, which a machine without an NVIDIA GPU cannot use.
set -eu
python=$1
torch=${TORCH:-torch==2.13.0}
cpu_wheels=https://download.pytorch.org/whl/cpu

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Whether pip, as the user has set it up, already prefers a CPU build of that version. Reads index pages only:
# a dry run of pip install would fetch the wheels themselves.
pip_gives_cpu() { "$python" -m pip index versions torch 2>/dev/null | grep -qF " ${torch#torch==}+cpu"; }

if [ -n "${TORCH_INDEX_URL:-}" ]; then
    set -- --extra-index-url "$TORCH_INDEX_URL" "$torch"
elif has_gpu || [ "$(uname -s)" != Linux ] || pip_gives_cpu; then
    set -- "$torch"
else
    case $torch in
        torch==*+*) set -- "$torch" ;;
        torch==*) set -- --extra-index-url "$cpu_wheels" "$torch+cpu" ;; # +cpu, or none: never the CUDA build
        *) set -- --extra-index-url "$cpu_wheels" "$torch" ;;
    esac
fi
echo "pip install $*"
"$python" -m pip install "$@" || {
    echo "error: PyTorch could not be installed; TORCH_INDEX_URL=URL names another place to find its wheels" >&2
    exit 1
}
