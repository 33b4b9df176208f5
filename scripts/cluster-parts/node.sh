#!/usr/bin/env bash
# The first process of a node's namespaces, started by `scripts/cluster`: node.sh STATE BIN CONTROL_GROUP. It starts
# everything, writes STATE/ready and adopts orphans, as an init does. When it ends, the kernel ends the rest.
set -euo pipefail
state=$1 bin=$2 control_group=$3
pids=node-pids # ids as this process namespace counts them
. "$(dirname "$0")/processes.sh"
. "$(dirname "$0")/control-plane.sh"
cd "$state"
mkdir node-pids containerd cni kubelet

# The mounts of pods' volumes have to reach the kubelet and containerd alike, and stay in this mount namespace.
mount --make-rshared /
# Folders that no setting moves: empty ones here, so that nothing of this node is left in the machine's.
for folder in /run/containerd /var/lib/cni /var/lib/kubelet; do
    mkdir -p "$folder"
    mount -t tmpfs tmpfs "$folder"
done

# One machine, one address; a pair of virtual cables, as small kernels have no dummy device.
ip link set lo up
ip link add node0 type veth peer name node0-peer
ip link set node0-peer up
ip address add "$node_ip/24" dev node0
ip link set node0 up
ip route add default via "$node_ip" dev node0
sysctl -qw net.ipv4.ip_forward=1

make_authority
server=https://$node_ip:6443
for subject in kube-apiserver=/CN=kube-apiserver admin=/O=system:masters/CN=admin \
    kube-controller-manager=/CN=system:kube-controller-manager kube-scheduler=/CN=system:kube-scheduler \
    kubelet=/O=system:nodes/CN=system:node:$node_name kube-proxy=/CN=system:kube-proxy coredns=/O=system:masters/CN=coredns \
    metrics-server=/O=system:masters/CN=metrics-server; do
    certificate "${subject%%=*}" "${subject#*=}"
    kubeconfig "${subject%%=*}" "$server"
done
mv pki/kube-apiserver.crt pki/apiserver.crt
mv pki/kube-apiserver.key pki/apiserver.key
certificate front-proxy /CN=front-proxy # the API server's, when it passes a request on to metrics-server

cat > containerd/config.toml <<TOML
version = 2
root = "$state/containerd/root"
state = "$state/containerd/state"
[grpc]
  address = "$state/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/busybox:test"
  restrict_oom_score_adj = true # a container may not have the right to lower its score
  netns_mounts_under_state_dir = true # nothing of this node in /run/netns
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$state/cni"
[plugins."io.containerd.internal.v1.opt"]
  path = "$state/containerd/opt"
TOML
cat > cni/pods.conflist <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{
  "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
  "ipam": {"type": "host-local", "dataDir": "$state/cni-addresses", "ranges": [[{"subnet": "10.244.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
cat > kubelet/config.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $state/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $state/pki/kubelet.crt
tlsPrivateKeyFile: $state/pki/kubelet.key
containerRuntimeEndpoint: unix://$state/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$control_group
clusterDNS: [$node_ip]
clusterDomain: cluster.local
resolvConf: "" # names outside of the cluster lead nowhere
podLogsDir: $state/kubelet/logs
failSwapOn: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%} # the disk is shared with others
YAML
cat > kube-proxy.yaml <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: $node_name
clusterCIDR: 10.244.0.0/16
clientConnection: {kubeconfig: $state/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s} # limits of the whole machine
YAML
# A process instead of the usual Deployment: the same answers, and no image, roles or rollout to wait for.
cat > Corefile <<CORE
cluster.local:53 {
    bind $node_ip
    errors
    kubernetes cluster.local {
        kubeconfig $state/coredns.kubeconfig
        pods insecure
    }
}
CORE

# As its manifest would, but of a process: the metrics API is served at the node's address.
cat > metrics.yaml <<YAML
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {namespace: kube-system, name: metrics-server}
  caBundle: $(base64 -w0 pki/ca.crt)
---
apiVersion: v1
kind: Service
metadata: {namespace: kube-system, name: metrics-server}
spec: {ports: [{port: 443, targetPort: 4443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: kube-system, name: metrics-server, labels: {kubernetes.io/service-name: metrics-server}}
addressType: IPv4
ports: [{port: 4443}]
endpoints: [{addresses: [$node_ip]}]
YAML

start containerd containerd --config containerd/config.toml
start_etcd
api_server() {
    start_apiserver "$node_ip" 6443 --authorization-mode=Node,RBAC --kubelet-preferred-address-types=InternalIP \
        --kubelet-client-certificate=pki/admin.crt --kubelet-client-key=pki/admin.key --kubelet-certificate-authority=pki/ca.crt \
        --proxy-client-cert-file=pki/front-proxy.crt --proxy-client-key-file=pki/front-proxy.key \
        --requestheader-client-ca-file=pki/ca.crt --requestheader-allowed-names=front-proxy \
        --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
        --requestheader-extra-headers-prefix=X-Remote-Extra-
}
api_server
await kube-apiserver kubectl get --raw=/readyz
start kube-scheduler "$bin/kube-scheduler" --kubeconfig=kube-scheduler.kubeconfig --leader-elect=false
start coredns "$bin/coredns" -conf Corefile
start kube-proxy "$bin/kube-proxy" --config kube-proxy.yaml
await containerd test -S containerd/containerd.sock
ctr --address containerd/containerd.sock --namespace k8s.io images import busybox.tar > logs/busybox.log
start kubelet "$bin/kubelet" --kubeconfig=kubelet.kubeconfig --config=kubelet/config.yaml --root-dir="$state/kubelet/root" \
    --hostname-override="$node_name" --node-ip="$node_ip"
# An autoscaler waits for five minutes before it believes in less load, and for as long before it counts a new pod's.
start_controllers kube-controller-manager --use-service-account-credentials=true \
    --horizontal-pod-autoscaler-downscale-stabilization=15s --horizontal-pod-autoscaler-cpu-initialization-period=15s \
    --horizontal-pod-autoscaler-initial-readiness-delay=5s
start metrics-server "$bin/metrics-server" --kubeconfig=metrics-server.kubeconfig --bind-address="$node_ip" --secure-port=4443 \
    --authentication-kubeconfig=metrics-server.kubeconfig --authorization-kubeconfig=metrics-server.kubeconfig \
    --tls-cert-file=pki/metrics-server.crt --tls-private-key-file=pki/metrics-server.key \
    --kubelet-certificate-authority=pki/ca.crt --kubelet-preferred-address-types=InternalIP --metric-resolution=10s \
    --kubelet-request-timeout=5s
kubectl apply --filename metrics.yaml > logs/metrics-api.log
await "the node" kubectl wait --for=condition=Ready "node/$node_name" --timeout=1s
touch ready
# Bash waits for every child that it has or is given. The API server is started again when it has ended, as a kubelet does
# with a control plane in static pods; whatever else ends stays so.
while :; do
    sleep 1 &
    wait
    is_running "$pids/kube-apiserver" || api_server
done
