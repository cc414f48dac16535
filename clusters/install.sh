#!/usr/bin/env bash
# Makes a machine a node of LoRAFleet's cluster: Python packages in ~/lorafleet-env, from the source in ~/lorafleet.
# Run again, it brings them up to date. For Ubuntu 22.04 or later; elsewhere Python 3.10 or later has to be there, with venv.
#
#   install.sh worker     the packages
#   install.sh head       and the Chroma server, which systemd starts again whenever it ends
set -euo pipefail

role=${1:?Say what this machine is: install.sh head or install.sh worker}
source=$HOME/lorafleet
environment=$HOME/lorafleet-env

if ! python3 -c 'import ensurepip, venv' 2> /dev/null; then
  sudo apt-get update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv
fi
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check --constraint "$source/constraints.txt" --editable "$source"
line=". $source/clusters/environment.sh"
grep -qsxF "$line" "$HOME/.bashrc" || echo "$line" >> "$HOME/.bashrc"

if [ "$role" = head ]; then
  sudo mkdir -p /var/lib/chroma
  sudo chown "$USER" /var/lib/chroma
  sudo install -m 644 "$source/clusters/chroma@.service" /etc/systemd/system/chroma@.service
  sudo systemctl daemon-reload
  # Where it runs it goes on: an update of the cluster does not interrupt the index.
  sudo systemctl enable --now "chroma@$USER"
fi
