#!/usr/bin/env bash
# Mounts the data volume of a head at /var/lib/chroma, now and at every start. A volume without a file system gets one;
# one that has data keeps it.
#
#   mount_volume.sh                      the one disk that is neither partitioned nor mounted (AWS names it as it likes)
#   mount_volume.sh /dev/disk/by-id/...  this one
set -euo pipefail

label=lorafleet-chroma
place=/var/lib/chroma

# Whether a disk has no partitions, is mounted nowhere, and holds nothing that anybody would recognise.
empty() {
  [ "$(lsblk --noheadings --output NAME "$1" | wc -l)" = 1 ] &&
    [ -z "$(lsblk --noheadings --output MOUNTPOINT "$1" | tr -d '[:space:]')" ] &&
    ! sudo blkid --probe "$1" > /dev/null
}

if ! sudo blkid -L "$label" > /dev/null; then
  volume=${1:-}
  if [ -z "$volume" ]; then
    found=()
    for disk in $(lsblk --noheadings --nodeps --paths --output NAME,TYPE | awk '$2 == "disk" && $1 !~ /ram/ {print $1}'); do
      if empty "$disk"; then found+=("$disk"); fi
    done
    if [ "${#found[@]}" != 1 ]; then
      echo "There is not one empty disk, but: ${found[*]:-none}. Name it: mount_volume.sh /dev/..." >&2
      exit 1
    fi
    volume=${found[0]}
  elif ! empty "$volume"; then
    echo "$volume is not empty. Give an empty volume, or one whose file system has the label $label" >&2
    exit 1
  fi
  sudo mkfs.ext4 -q -L "$label" "$volume"
fi
sudo mkdir -p "$place"
entry="LABEL=$label $place ext4 defaults,nofail,x-systemd.device-timeout=30 0 2"
grep -qsxF "$entry" /etc/fstab || echo "$entry" | sudo tee -a /etc/fstab > /dev/null
mountpoint -q "$place" || sudo mount "$place"
sudo chown "$USER" "$place"
