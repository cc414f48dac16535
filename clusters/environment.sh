# shellcheck shell=sh
# What every shell on a node of the cluster knows: Ray's launcher runs its commands in login shells.
export PATH="$HOME/lorafleet-env/bin:$PATH"
# Ray lets in who has the token of ~/.ray/auth_token.
export RAY_AUTH_MODE=token
# The folder that all nodes see.
export LORAFLEET_STATE=/mnt/lorafleet
