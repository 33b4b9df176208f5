# Sourced: certificates, etcd, the API server and the controllers. Works in STATE; wants `state` and `bin` to be set.

# The node's address exists in the node's network only. The API server's service always has the first of the range.
node_name=node0 node_ip=192.0.2.1 service_range=10.96.0.0/16 api_service=10.96.0.1

# certificate NAME SUBJECT. Elliptic curves: RSA keys take seconds to make.
certificate() {
    local names=DNS:localhost,DNS:$node_name,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc
    names+=,DNS:metrics-server.kube-system.svc
    openssl req -x509 -CA pki/ca.crt -CAkey pki/ca.key -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
        -subj "$2" -addext "subjectAltName=$names,IP:127.0.0.1,IP:$node_ip,IP:$api_service" \
        -addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage=clientAuth,serverAuth \
        -keyout "pki/$1.key" -out "pki/$1.crt" 2> pki/errors || die "openssl could not make the certificate of $1: $(cat pki/errors)"
}

make_authority() {
    mkdir -p pki
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=sensorium-tests \
        -keyout pki/ca.key -out pki/ca.crt 2> pki/errors || die "openssl could not make an authority: $(cat pki/errors)"
    openssl ecparam -name prime256v1 -genkey -noout -out pki/accounts.key # signs the tokens of service accounts
}

# kubeconfig NAME SERVER: for the holder of a certificate; self-contained, so that it can be copied.
kubeconfig() {
    cat > "$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: tests, cluster: {server: "$2", certificate-authority-data: $(base64 -w0 pki/ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "pki/$1.crt"), client-key-data: $(base64 -w0 "pki/$1.key")}}]
contexts: [{name: tests, context: {cluster: tests, user: $1}}]
current-context: tests
YAML
}

kubectl() { "$bin/kubectl" --kubeconfig "$state/admin.kubeconfig" "$@"; }

# Sockets instead of ports: nobody else can have them. They are files in STATE, and relative, as the path of a socket has at
# most 107 bytes; their names end with what etcd takes for a port.
start_etcd() {
    local peer=unix://etcd-peer:0 client=unix://etcd:0
    start etcd "$bin/etcd" --name tests --data-dir etcd-data --unsafe-no-fsync --log-level warn \
        --listen-client-urls $client --advertise-client-urls $client \
        --listen-peer-urls $peer --initial-advertise-peer-urls $peer --initial-cluster tests=$peer
    await etcd test -S etcd:0
}

# start_apiserver ADDRESS PORT ARGUMENT...
start_apiserver() {
    local address=$1 port=$2
    shift 2
    start kube-apiserver "$bin/kube-apiserver" --etcd-servers=unix://etcd:0 --bind-address="$address" --secure-port="$port" \
        --advertise-address="$node_ip" --service-cluster-ip-range="$service_range" --allow-privileged=true \
        --tls-cert-file=pki/apiserver.crt --tls-private-key-file=pki/apiserver.key --client-ca-file=pki/ca.crt \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=pki/accounts.key \
        --service-account-signing-key-file=pki/accounts.key "$@"
}

# start_controllers KUBECONFIG ARGUMENT...: with many hands and no rate limit, because tests wait for them.
start_controllers() {
    local config=$1
    shift
    start kube-controller-manager "$bin/kube-controller-manager" --kubeconfig="$config.kubeconfig" --leader-elect=false \
        --root-ca-file=pki/ca.crt --service-account-private-key-file=pki/accounts.key \
        --kube-api-qps=1000 --kube-api-burst=2000 --concurrent-job-syncs=20 --concurrent-deployment-syncs=20 \
        --concurrent-replicaset-syncs=20 --concurrent-service-endpoint-syncs=20 --concurrent-gc-syncs=40 \
        --concurrent-namespace-syncs=20 --horizontal-pod-autoscaler-sync-period=2s "$@"
    # No pod is accepted before its namespace has this account.
    await kube-controller-manager kubectl get serviceaccount default
}
