#!/bin/sh
# Install PyTorch into the environment of the Python given as first argument; `make help` describes the variables.
# On Linux the default wheel brings gigabytes of CUDA packages, which a machine without an NVIDIA GPU cannot use.
set -eu
python=$1
torch=${TORCH:-torch==2.13.0}
index=${TORCH_INDEX_URL:-}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Check whether pip, with the user's settings, finds a CPU build of that version. This reads index
# pages only; a dry run of pip install would fetch the wheels.
pip_finds_cpu() { "$python" -m pip index versions torch 2>/dev/null | grep -qF " ${torch#torch==}+cpu"; }

if [ "$(uname -s)" = Linux ] && ! has_gpu; then
    if [ -z "$index" ] && ! pip_finds_cpu; then
        index=https://download.pytorch.org/whl/cpu
    fi
    case $torch in
        torch==*+*) ;;                # the user names a build
        torch==*) torch="$torch+cpu" ;; # never CUDA by accident
    esac
fi
echo "installing $torch${index:+ with the help of $index}"
"$python" -m pip install ${index:+--extra-index-url "$index"} "$torch" || {
    echo "error: $torch could not be installed; TORCH_INDEX_URL=URL names another place to find its wheels" >&2
    exit 1
}
