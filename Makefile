# Cloister's make targets; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := build

export CGO_ENABLED ?= 0
GOARCH  ?= $(shell go env GOARCH)
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
TOOLS   := $(CURDIR)/bin/tools
GUEST   := internal/guest/binary/bin/cloister-guest-$(GOARCH)
SENTRY  := internal/engine/gvisor/sentry/bin/cloister-sentry-$(GOARCH).gz
LDFLAGS := -s -w -X github.com/cloister-dev/cloister/internal/cli.version=$(VERSION)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo "sudo --preserve-env=PATH,GOPROXY,GOFLAGS,HOME")
FUZZTIME ?= 10s
CHAOS_TIME ?= 10m

.PHONY: help up down test build guest sentry gen lint unit race hosts e2e load load-cluster fuzz chaos cover clean install-deps

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: ## install what the machine lacks, build, start, and show a sandbox that ran a command
	@$(SUDO) test/script/install-deps run
	@$(MAKE) --no-print-directory build
	@$(SUDO) bin/cloister up --detach $(UP_FLAGS)

down: ## stop what `make up` started; sandboxes end with DOWN_FLAGS=--purge
	@$(SUDO) bin/cloister down $(DOWN_FLAGS)

test: ## install what the tests need; run the unit, hosts and end-to-end tests
	@$(SUDO) test/script/install-deps test
	@$(MAKE) --no-print-directory build
	@$(SUDO) env REQUIRE_HOSTS=1 test/script/test-all

build: guest sentry ## build the one static binary bin/cloister
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/cloister ./cmd/cloister

guest: ## build the agent that runs inside sandboxes; bin/cloister carries it
	go build -trimpath -ldflags '-s -w' -o $(GUEST) ./cmd/cloister-guest

sentry: ## build the program that sandboxes run in; bin/cloister carries it
	go build -trimpath -ldflags '-s -w' -o bin/cloister-sentry ./cmd/cloister-sentry
	@[ $(SENTRY:.gz=.sha256) -nt bin/cloister-sentry ] || { gzip -6 -n -c bin/cloister-sentry > $(SENTRY) && \
		sha256sum < bin/cloister-sentry > $(SENTRY:.gz=.sha256); }

gen: $(TOOLS)/buf ## regenerate internal/gen from proto/
	PATH=$(TOOLS):$$PATH buf generate
	PATH=$(TOOLS):$$PATH buf lint

lint: $(TOOLS)/golangci-lint gen-check ## run the linters and check that generated code is current
	go vet ./...
	$(TOOLS)/golangci-lint run ./...
	shellcheck test/script/* .ci/run

.PHONY: gen-check
gen-check: gen
	@git diff --exit-code -- internal/gen || { echo "internal/gen is out of date: commit what 'make gen' wrote"; exit 1; }

unit: guest ## run the unit tests (those that need root are skipped without it)
	go test ./cmd/... ./internal/...

race: guest ## run the unit tests under the race detector
	CGO_ENABLED=1 go test -race $$(go list ./internal/... | grep -v /engine/gvisor)

hosts: build ## run the tests that use network namespaces and real sandboxes (root)
	$(SUDO) env REQUIRE_HOSTS=1 go test -count=1 -p 1 -timeout 20m ./test/hosts/...

chaos: build ## break a cluster at random for CHAOS_TIME, and check its promises; CHAOS_SEED repeats a run (root)
	$(SUDO) env REQUIRE_HOSTS=1 CHAOS_TIME=$(CHAOS_TIME) CHAOS_SEED=$(CHAOS_SEED) CHAOS_LOG=$(CHAOS_LOG) \
		go test -count=1 -v -timeout 2h ./test/chaos

e2e: build ## drive the real binary with the pinned npm packages (root)
	$(SUDO) env REQUIRE_HOSTS=1 go test -count=1 -timeout 20m ./test/e2e/...

load: build ## print benchmark lines of the hot paths (root)
	$(SUDO) go test -run '^$$' -bench . -benchtime 2s ./test/load/... ./internal/proxy/... ./internal/journal/... ./internal/scheduler/...

load-cluster: build ## print what machines of a cluster cost each other, in a few minutes (root, on a machine that does nothing else)
	$(SUDO) env REQUIRE_HOSTS=1 go test -run '^$$' -bench . -benchtime 1x -count=1 -timeout 20m ./test/load/cluster

fuzz: guest ## run every fuzz test for FUZZTIME
	FUZZTIME=$(FUZZTIME) test/script/fuzz-all

clean: ## remove what was built
	rm -rf bin $(GUEST) $(SENTRY) $(SENTRY:.gz=.sha256)

$(TOOLS)/buf: tools/go.mod
	cd tools && GOBIN=$(TOOLS) go install tool && touch $@

$(TOOLS)/golangci-lint: tools/lint/go.mod
	cd tools/lint && GOBIN=$(TOOLS) go install tool && touch $@
