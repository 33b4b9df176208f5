# The one front door. `make` alone lists the targets.
#
# Everything is built with one cargo profile (release: tests train networks), so nothing is compiled twice. The model
# server is shipped and measured in one of its own (dist), which takes longer to build.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
CARGO_FLAGS := --release --locked
DIST_FLAGS := --profile dist --locked
BIN := target/release/sensorium

# onnxruntime tells its makers about machine and program otherwise, from tests and benches, too.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: help setup build dist quickstart test test-env test-gpu test-node cluster-binaries images lint chart-lint fmt generate clean bench-operator bench-server bench-soak

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{ printf "  make %-16s %s\n", $$1, $$2 }'

setup: ## Fetch libtorch, onnxruntime and the example data into the cache (idempotent)
	@scripts/setup

build: setup ## Build the programs
	@cargo build $(CARGO_FLAGS) --workspace

dist: setup ## Build the model servers as they are shipped, in target/dist: slower to build, faster to run
	@cargo build $(DIST_FLAGS) --workspace --bin sensorium-server --bin sensorium-server-torch

quickstart: build ## Train, compress and serve a multimodal model on this machine, and ask it four questions
	@$(BIN) data import easy-vqa
	@$(BIN) up examples/easy-vqa

test-env: setup ## Make the Python environment of the client tests (the programs need no Python)
	@scripts/test-env >/dev/null

cluster-binaries: ## Build etcd and Kubernetes for the tests of the operator, once (needs Go)
	@scripts/cluster-binaries api >/dev/null

test: test-env cluster-binaries ## Run everything that CI runs
	cargo fmt --all --check
	cargo build $(CARGO_FLAGS) --workspace --all-targets
	@# The node's half of Kubernetes, for the last of the whole-system tests, is built while those before it wait. Without root
	@# there is no node; what goes wrong here that test says again.
	@if [ "$$(id -u)" = 0 ]; then scripts/cluster-binaries node >target/cluster-binaries.log 2>&1 & fi
	cargo test $(CARGO_FLAGS) --workspace

test-gpu: test-env ## Run the tests that need a GPU, on a machine with one (SENSORIUM_ONNXRUNTIME: an onnxruntime for CUDA)
	@# One loses the GPU to its process on purpose, and so has a process of its own.
	cargo test $(CARGO_FLAGS) --package sensorium-engine --test onnxruntime -- --ignored gpu
	cargo test $(CARGO_FLAGS) --package sensorium-engine-torch --test torchscript -- --ignored gpu --skip loses_it
	cargo test $(CARGO_FLAGS) --package sensorium-engine-torch --test torchscript -- --ignored loses_it
	cargo test $(CARGO_FLAGS) --package sensorium-server-torch --test torch -- --ignored gpu

test-node: build test-env ## Run the tests on a real node alone (root; installs containerd on Debian)
	cargo test $(CARGO_FLAGS) --workspace --test real_node -- --nocapture

bench-operator: build cluster-binaries ## Measure the operator on a real API server (BENCH_FLAGS="--jobs 10000" for more)
	@$(dir $(BIN))bench-operator $(BENCH_FLAGS)

bench-server: dist ## Measure the model server beside Triton, KServe and its limits (BENCH_FLAGS="--model silero-vad" for less)
	@cargo build $(DIST_FLAGS) --workspace --bin bench-server
	@python=$$(scripts/test-env bench) && "$$python" bench/peers/models.py target/bench-models && \
		BENCH_PYTHON="$$python" BENCH_MODELS=target/bench-models target/dist/bench-server $(BENCH_FLAGS)

bench-soak: build ## Put the released server under stress on loopback, some minutes (BENCH_FLAGS="--only fuzz" for a part)
	@$(dir $(BIN))bench-soak $(BENCH_FLAGS)

images: build ## Build the container images into the cache (root; installs buildah and mmdebstrap on Debian)
	@scripts/images

lint: setup ## Check format and lints; warnings are errors
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

chart-lint: cluster-binaries ## Check the Helm chart as far as that can be done without a cluster
	@"$$(scripts/cluster-binaries api)/helm" lint --strict charts/sensorium

fmt: ## Format the code
	cargo fmt --all

generate: setup ## Write the generated files: the CRDs, the chart's copies of them, the reference of all fields
	cargo run $(CARGO_FLAGS) --package sensorium-api --example crdgen
	cp crds/*.yaml charts/sensorium/files/crds/

clean: ## Remove what was built and run here; the cache stays
	cargo clean
	rm -rf .sensorium
