# Trivet: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

GO      ?= go
BIN     := bin
CMDS    := ca ocsp lb hsmd pkictl
FUZZ    ?= 5s

# Without debugging information compiling takes a fifth less; stack traces and profiles do not need it. Nobody speaks msgpack here, and gin's
# encoder of it takes longer to compile than anything else.
ifeq (,$(findstring -dwarf=,$(GOFLAGS)))
export GOFLAGS += -gcflags=all=-dwarf=false -ldflags=-w -tags=nomsgpack
endif
# A program with the race detector waits a second before it exits, for reports of other threads.
export GORACE ?= atexit_sleep_ms=100
# Compilers and tests with the race detector spend much of their time on collecting garbage: with more memory it is less.
build test packages scenarios: export GOGC ?= 400

# What the race detector runs over: everything but the end-to-end scenarios. The longest begin first, so that nothing waits for them alone.
PACKAGES = ./ca ./hsmsync ./ops/galera $(shell $(GO) list ./... | grep -v -e '/e2e' -e '/bench')

# Where tests keep their data: in memory, if there is room. Processes are killed, machines are not, so that a disk would prove nothing more; and what
# compilers write to the same disk holds up every fsync for seconds. `make chaos` and `make bench` use the disk.
MEMORY := $(shell [ -w /dev/shm ] && [ $$(df -k --output=avail /dev/shm | tail -n 1) -gt 8000000 ] && awk '/^MemAvailable:/ { exit $$2 < 12000000 }' /proc/meminfo && echo /dev/shm)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: ## install the Debian packages that are missing
	@ops/install.sh run

.PHONY: build
build: ## build bin/ca, bin/ocsp, bin/lb, bin/hsmd, bin/pkictl
	@mkdir -p $(BIN)
	@echo "build: $(CMDS:%=bin/%)"
	@$(GO) build -o $(BIN)/ $(CMDS:%=./cmd/%)

.PHONY: demo
demo: install build ## start the whole cluster here, issue, check and revoke a first certificate, leave it running
	@$(BIN)/pkictl demo up && $(BIN)/pkictl demo try

.PHONY: demo-down
demo-down: ## stop the demo and remove all of it
	@if [ -x $(BIN)/pkictl ]; then $(BIN)/pkictl demo down; else echo "demo-down: bin/pkictl is not built, so no demo was started from here"; fi

.PHONY: lint
lint: ## gofmt, vet, staticcheck, and the import rules of ops/lint/imports.yaml
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt: run gofmt -w on:"; echo "$$out"; exit 1; fi
	@$(GO) vet ./...
	@$(GO) tool staticcheck ./...
	@$(GO) test -count=1 ./ops/lint

.PHONY: test-fast
test-fast: ## the tests that need no database and no HSM, without the race detector
	@$(GO) test -short ./...

test packages scenarios: export TMPDIR := $(or $(MEMORY),$(TMPDIR))

.PHONY: test
test: ## everything that must pass before a merge: lint, all tests under the race detector, end to end, some fuzzing
	@$(MAKE) --no-print-directory -j2 tools modules
	@$(MAKE) --no-print-directory packages
	@$(MAKE) --no-print-directory build
	@$(MAKE) --no-print-directory -j2 scenarios beside

.PHONY: tools
tools:
	@ops/install.sh test

.PHONY: modules
modules:
	@$(GO) list -deps -test ./... >/dev/null

# Lint vets: there is no need to do it twice. More than three packages at a time only wait for one another. They share blank tokens: RSA keys are slow.
.PHONY: packages
packages: ## all tests but the end-to-end scenarios, under the race detector
	@echo "test: packages, race detector"
	@shared=$$(mktemp -d) && trap 'rm -rf "$$shared"' EXIT && HSMTEST_SHARED=$$shared $(GO) test -race -vet=off -p 3 -timeout 20m $(PACKAGES)

.PHONY: scenarios
scenarios: ## the end-to-end scenarios, with what make build built
	@echo "test: end to end"
	@$(GO) test -count=1 -p 1 -timeout 20m ./e2e

# Beside the scenarios, which wait more than they compute, and behind them in the queue for the processors.
.PHONY: beside
beside:
	@echo "test: lint"
	@out=$$(nice -n 19 $(MAKE) --no-print-directory lint 2>&1) || { echo "$$out"; exit 1; }
	@$(MAKE) --no-print-directory fuzz-some

.PHONY: fuzz-some
fuzz-some: ## a few fuzz targets for half a minute each, others with every commit
	@echo "test: fuzzing"
	@out=$$(GOMAXPROCS=1 nice -n 19 ops/fuzz.sh 30s 2 2>&1) || { echo "$$out"; exit 1; }

.PHONY: chaos
chaos: build ## kill each kind of process under load; table and build/chaos.json (CHAOS=name for one row)
	@ops/install.sh test
	@mkdir -p build
	@$(GO) test -count=1 -v -timeout 30m -run 'TestKill' ./e2e -args -chaos-table -chaos-row=$(CHAOS)

.PHONY: soak
soak: build ## issue SOAK (default 100000) certificates while every part dies, freezes and is cut off at random; then check (SEED=n repeats)
	@ops/install.sh test
	@$(GO) test -count=1 -v -timeout 12h -run 'TestEveryPartFails' ./e2e -args -soak $(or $(SOAK),100000) -soak-seed $(or $(SEED),0)

.PHONY: model
model: ## check every protocol model, and that each removed rule gives a counterexample; table (MODEL=name for one)
	@ops/install.sh test
	@$(GO) test -count=1 -v -timeout 3h ./docs/models -args -all -model=$(MODEL) | grep -v -e '^=== ' -e '^ *--- PASS' | sed 's/^ *models_test.go:[0-9]*: //'; exit $${PIPESTATUS[0]}

.PHONY: bench
bench: build ## measure beside references; table and build/bench.json (BENCH=name for one row and those measured with it)
	@ops/install.sh test
	@mkdir -p build
	@$(GO) run ./bench

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZ (default 5s) each; SOME=2 runs two, chosen by the commit's hash; KEEP=20 keeps inputs
	@ops/fuzz.sh $(FUZZ) $(SOME)

.PHONY: clean
clean: ## remove bin/ and build/
	@rm -rf $(BIN) build
