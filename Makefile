# The one front door. `make` alone lists the targets.
#
# Everything is built with one cargo profile (release: tests train networks), so nothing is compiled twice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
CARGO_FLAGS := --release --locked
BIN := target/release/sensorium

.PHONY: help setup build quickstart test test-env lint fmt generate clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: ## Fetch libtorch, onnxruntime and the example data into the cache (idempotent)
	@scripts/setup

build: setup ## Build the programs
	@cargo build $(CARGO_FLAGS) --workspace

quickstart: build ## Train, compress and serve a multimodal model on this machine, and ask it four questions
	@$(BIN) data import easy-vqa
	@$(BIN) up examples/easy-vqa

test-env: setup ## Make the Python environment of the client tests (the programs need no Python)
	@scripts/test-env >/dev/null

test: test-env ## Run everything that CI runs
	cargo fmt --all --check
	cargo build $(CARGO_FLAGS) --workspace --all-targets
	cargo test $(CARGO_FLAGS) --workspace

lint: setup ## Check format and lints; warnings are errors
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

fmt: ## Format the code
	cargo fmt --all

generate: setup ## Write the generated files: the CRDs
	cargo run $(CARGO_FLAGS) --package sensorium-api --example crdgen

clean: ## Remove what was built and run here; the cache stays
	cargo clean
	rm -rf .sensorium
