#!/usr/bin/env bash
# Makes a bare one-machine cluster fit for these tests: bare.sh FOLDER [ADDRESS]. FOLDER has what its parts were started
# with: kubeconfig, kubelet.yaml and a PART.pid for each. ADDRESS, which pods reach: where names.py will answer.
#
# - Controllers and scheduler do not stand for election: on a busy machine they would lose it, and end.
# - Pods ask ADDRESS for names, and the API server finds the node by its own, for logs.
set -euo pipefail
cd "$1"; address=${2:-}
again() {
  local part=$1; shift
  [ -f "$part.pid" ] || return 0
  mapfile -d '' -t command <"/proc/$(cat "$part.pid")/cmdline"
  kill "$(cat "$part.pid")"
  while kill -0 "$(cat "$part.pid")" 2>/dev/null; do sleep 0.2; done
  setsid "${command[@]}" "$@" >>"$part.log" 2>&1 </dev/null &
  echo $! >"$part.pid"
}
for part in controllers scheduler; do
  tr '\0' ' ' <"/proc/$(cat $part.pid)/cmdline" | grep -q leader-elect=false || again $part --leader-elect=false
done
if [ -n "$address" ] && ! grep -q clusterDNS kubelet.yaml; then
  printf 'clusterDNS: [%s]\nclusterDomain: cluster.local\n' "$address" >>kubelet.yaml
  again kubelet
  node=$(kubectl --kubeconfig kubeconfig get nodes --output 'jsonpath={.items[0].metadata.name}')
  grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
fi
