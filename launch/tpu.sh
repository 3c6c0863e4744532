#!/usr/bin/env bash
# Fine-tunes on one Cloud TPU slice, or on several, by gcloud. See docs/running.md.
#
#   launch/tpu.sh create                 asks for the slices; they come when there is room
#   launch/tpu.sh status                 ACTIVE when they are there
#   launch/tpu.sh install                mounts /shared, copies this folder and installs it
#   launch/tpu.sh train [flags]          starts the same command on every host, detached
#   launch/tpu.sh log                    follows what host 0 prints
#   launch/tpu.sh stop                   SIGTERM on every host: all save the same step
#   launch/tpu.sh delete                 gives the slices back
#
# DRY_RUN=1 prints the commands of gcloud instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME="${NAME:-jaxft}"                     # of the queued resource and, with a number, of its slices
ZONE="${ZONE:-us-east5-b}"
TYPE="${TYPE:-v6e-16}"                    # of one slice; v5litepod-16 for v5e
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"     # v2-alpha-tpuv5-lite for v5e
SLICES="${SLICES:-1}"
CAPACITY="${CAPACITY-spot}"               # spot, reserved, or empty for on demand
SHARE="${SHARE:-10.0.0.2:/share}"         # NFS, such as Filestore, that becomes /shared

run() {
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

everywhere() {
    run gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=all --worker=all \
        --command="$1"
}

# Names of the slices: that of the resource if there is one slice, else with a number.
nodes() {
    if [[ "$SLICES" == 1 ]]; then
        echo "$NAME"
    else
        seq --format="$NAME-%.0f" 0 "$((SLICES - 1))"
    fi
}

create() {
    local flags=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME" --zone="$ZONE")
    if [[ "$SLICES" == 1 ]]; then
        flags+=(--node-id="$NAME")
    else
        flags+=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    if [[ -n "$CAPACITY" ]]; then
        flags+=("--$CAPACITY")
    fi
    run gcloud compute tpus queued-resources create "$NAME" "${flags[@]}"
}

install() {
    local node
    # What git knows: no virtual environment, no runs.
    run git archive --output=/tmp/jaxft.tar.gz HEAD
    for node in $(nodes); do
        run gcloud compute tpus tpu-vm scp /tmp/jaxft.tar.gz "$node": --zone="$ZONE" --worker=all
    done
    everywhere "set -e
        sudo apt-get install -y -q nfs-common
        sudo mkdir -p /shared
        mountpoint -q /shared || sudo mount -t nfs $SHARE /shared
        mkdir -p jaxft && tar -xzf jaxft.tar.gz -C jaxft && cd jaxft
        curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --clear --python 3.12
        ~/.local/bin/uv pip install '.[tpu]'"
}

# The hosts find each other. With --resume a run that does not exist yet starts, so that the same
# command goes on after a preemption.
train() {
    local command
    command=$(printf '%q ' .venv/bin/jaxft train --config=configs/cluster.py --resume "$@")
    everywhere "cd jaxft || exit
        nohup $command >> train.log 2>&1 < /dev/null &
        echo \$! > train.pid"
}

case "${1:-}" in
    create) create ;;
    status) run gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" ;;
    install) install ;;
    train) train "${@:2}" ;;
    log)
        run gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=0 --worker=0 \
            --command="tail -n 100 -f jaxft/train.log"
        ;;
    stop) everywhere 'kill -TERM "$(cat jaxft/train.pid)"' ;;
    delete) run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
    *)
        sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
