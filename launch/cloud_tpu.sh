#!/bin/bash
# Train on a Cloud TPU slice, in two commands:
#
#   launch/cloud_tpu.sh create
#   launch/cloud_tpu.sh train --config configs/20b_v5e_4x8.py --init /mnt/share/gpt-oss-20b \
#       --data.train /mnt/share/chats.jsonl --workdir /mnt/share/runs/first
#
# The second goes on where the run was when it is given again, on a slice of any size. To stop the
# run: launch/cloud_tpu.sh stop (SIGTERM to one host: all agree on a step, save, and exit 0). And
# `gcloud compute tpus tpu-vm delete` when it is done: the slice costs as long as it is there.
#
# All hosts see one disk, an NFS server such as Filestore, with this repository at $CODE.

set -eu
NAME=${NAME:-gptoss}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-32}               # v5e 4x8: 8 hosts of 4 chips
VERSION=${VERSION:-v2-alpha-tpuv5-lite}  # v5p: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e
SHARE=${SHARE:-10.0.0.2:/share}          # of the NFS server
CODE=${CODE:-/mnt/share/gptoss_jax}
TPU="gcloud compute tpus tpu-vm"

case ${1:?create, train or stop} in
create)
    # --spot costs less and may be taken away: hosts get SIGTERM then, and the run saves.
    $TPU create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" --spot
    ;;
train)
    shift
    # On every host, each time, since it costs seconds: the disk, and an environment (the machines'
    # own Python is too old). JAX finds the other hosts by the TPU's metadata: one command for all.
    $TPU ssh "$NAME" --zone="$ZONE" --worker=all --command="
        set -e
        sudo mkdir -p /mnt/share
        mountpoint -q /mnt/share || sudo mount -t nfs $SHARE /mnt/share
        mkdir -p ~/code && cd $CODE && cp -r pyproject.toml README.md gptoss_jax configs ~/code
        test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
        test -d ~/venv || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv
        ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python ~/code[tpu]
        cd ~/code && exec ~/venv/bin/python -u -m gptoss_jax.train $(printf '%q ' "$@")"
    ;;
stop)
    $TPU ssh "$NAME" --zone="$ZONE" --worker=0 --command="pkill -TERM -f '[g]ptoss_jax.train'"
    ;;
esac
